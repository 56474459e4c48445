"""Filling an index from a folder, on any number of processes, going on where it stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.files import panoramas_in, said_of
from ..evaluation.asking import UNREADABLE
from ..options_panorama import check_workers
from .index import INDEX, PanoramaIndex, name_of
from .matching import TokenEncoder, Whitening

SHARDS = "shards"
_FITTED = 64  # panoramas on whose tokens the whitening is fitted
_TOGETHER = 64  # panoramas that are added at once


@dataclass
class Indexed:
    """What came out.

    Attributes:
        added: panoramas that are new in the index.
        held: panoramas that it holds.
        skipped: those that could not be read, with the reason, by path.
        left_out: files of the folder that are no panoramas, in words.
    """

    added: int = 0
    held: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: str = ""


class _Read(Dataset[Any]):
    """Views and what was seen of each file, or why it cannot be read."""

    def __init__(self, files: Sequence[str], encoder: TokenEncoder):
        self.files, self.encoder = files, encoder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[str, Any, str | None]:
        file = self.files[place]
        try:
            return name_of(file), self.encoder.panorama(file), None
        except UNREADABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return os.fsencode(file).decode(errors="backslashreplace"), None, reason


def index_folder(
    source: str | os.PathLike[str],
    encoder: TokenEncoder,
    output: str | os.PathLike[str],
    accelerator: Accelerator,
    *,
    batch_size: int = 8,
    workers: int = 0,
) -> Indexed:
    """Index the panoramas of a folder and of those inside of it; on all processes. A run that was stopped goes on.

    Args:
        source: a folder, or one file.
        encoder: the model, on the device of this process.
        output: folder of the index, on a disk that all processes share.
        accelerator: of this process.
        batch_size: panoramas that the model is shown at once.
        workers: processes that read files, for each of the processes; 0: none.

    Raises:
        ValueError: where there is nothing to index, and for the index of another model.
    """
    check_workers("workers", workers)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"there is no {str(source)!r}")
    files, left_out = panoramas_in(path) if path.is_dir() else ([str(path)], {})
    if not files:
        raise ValueError(f"there is no panorama in {str(source)!r}{': ' + said_of(left_out) if left_out else ''}")
    output = Path(output)
    problem = None
    if accelerator.is_main_process:
        try:
            _make_ready(files, encoder, output)
        except (*UNREADABLE, ImportError) as error:
            problem = error
    problem = next((each for each in gather_object([problem]) if each is not None), None)
    if problem is not None:
        raise problem
    index = PanoramaIndex(output, encoder)
    held = index.panoramas()
    left = [file for file in files if os.path.abspath(file) not in held]
    own = left[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # before anyone adds: all of them see the same
    if accelerator.num_processes > 1:
        name = f"{accelerator.process_index:05}-of-{accelerator.num_processes:05}"
        index = PanoramaIndex.create(output / SHARDS / name, encoder, index.whitening)
    skipped = _add(own, encoder, index, batch_size, workers, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    result = Indexed(left_out=said_of(left_out) if left_out else "")
    for each in gather_object([skipped]):
        result.skipped |= each
    if accelerator.is_main_process:
        index = PanoramaIndex(output, encoder)
        _merge_shards(index)
        index.finish()
        names = index.panoramas()
        result.added, result.held = len(names - held), len(names)
    accelerator.wait_for_everyone()
    return result


def _make_ready(files: Sequence[str], encoder: TokenEncoder, output: Path) -> None:
    """An index to go on with: a new one, or the one that is there with the shards of a run that was stopped."""
    if (output / INDEX).is_file():
        _merge_shards(PanoramaIndex(output, encoder))
        return
    if output.is_dir() and any(each.name != SHARDS for each in output.iterdir() if not each.name.startswith(".")):
        known = {"whitening.safetensors", f"{INDEX}.new"}  # of a run that was stopped before the index was there
        if {each.name for each in output.iterdir()} - known:
            raise ValueError(f"{str(output)!r} holds other files and no index: choose another folder")
    order = np.random.default_rng(0).permutation(len(files))
    readable = (read for _, read, _ in map(_Read(files, encoder).__getitem__, order.tolist()) if read is not None)
    tokens = [encoder.panorama_tokens(views[None])[0][shown] for views, shown in islice(readable, _FITTED)]
    if not sum(map(len, tokens)):
        raise ValueError(f"none of {len(files)} panoramas can be read, such as {_Read(files, encoder)[0][2]}")
    PanoramaIndex.create(output, encoder, Whitening.fit(torch.cat(tokens)))


def _merge_shards(index: PanoramaIndex) -> None:
    for shard in sorted((index.folder / SHARDS).glob("*")):
        if (shard / INDEX).is_file():  # else it was stopped before anything was in it
            index.merge(shard)
        shutil.rmtree(shard)


def _add(
    files: Sequence[str], encoder: TokenEncoder, index: PanoramaIndex, batch_size: int, workers: int, shows: bool
) -> dict[str, str]:
    """Add files to an index; those that cannot be read, with the reason."""
    skipped: dict[str, str] = {}
    names: list[str] = []
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def commit() -> None:
        if names:
            tokens, shown = (torch.cat(each) for each in zip(*parts, strict=True))
            index.add(names, tokens, shown)
        names.clear()
        parts.clear()

    loader = DataLoader(_Read(files, encoder), batch_size=batch_size, num_workers=workers, collate_fn=list)
    with tqdm(total=len(files), desc="panoramas", unit="", disable=not shows) as progress:
        for batch in loader:
            read = [(name, *of_one) for name, of_one, _ in batch if of_one is not None]
            skipped |= {name: reason for name, of_one, reason in batch if of_one is None}
            if read:
                own, views, shown = zip(*read, strict=True)
                parts.append((encoder.panorama_tokens(torch.stack(views)), torch.stack(shown)))
                names.extend(own)
            if len(names) >= _TOGETHER:
                commit()
            progress.update(len(batch))
        commit()
    return skipped
