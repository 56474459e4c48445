"""Writing checkpoints: folders that are whole or not there, and which of them is the newest."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoint_panorama import OTHER_PARTS, STATE, checksum, read_state
from ..modeling_panorama import PanoramaVLM
from ..stages_panorama import STAGES
from .fingerprint import differences
from .stage import Stage

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"


class NotWritten(OSError):
    """A folder could not be written, and nothing of it is left."""


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What goes wrong with the disk says what could not be written. What is there of it is removed, because its space
    may be what is lacking."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # what torch.save raises
            raise
        shutil.rmtree(unfinished_folder(folder), ignore_errors=True)
        words = f"cannot write {str(folder)!r}: {error}. What was written before is whole: start the same command again"
        raise NotWritten(words) from error


@contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends: after a crash there is all of it or nothing.

    Every file is on the disk before the folder is renamed. A `folder` that is there already is replaced.

    Raises:
        NotWritten: for whatever the disk says; the folder is named.
    """
    folder = Path(folder)
    unfinished = unfinished_folder(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    with _named(folder):
        unfinished.mkdir(parents=True)
        yield unfinished
        commit_folder(unfinished, folder)


def commit_folder(unfinished: Path, folder: Path) -> None:
    """Make a written folder durable under its final name."""
    for path in [*unfinished.rglob("*"), unfinished]:
        _sync(path)
    if folder.exists():
        old = folder.with_name(f"{_UNFINISHED}old-{folder.name}")
        os.replace(folder, old)
        os.replace(unfinished, folder)
        shutil.rmtree(old)
    else:
        os.replace(unfinished, folder)
    _sync(folder.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was before."""
    unfinished = path.with_name(_UNFINISHED + path.name)
    unfinished.write_text(text, encoding="utf-8")
    _sync(unfinished)
    os.replace(unfinished, path)


def unfinished_folder(folder: Path) -> Path:
    """Where the content of `folder` is written before :func:`commit_folder`."""
    return folder.with_name(_UNFINISHED + folder.name)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """The last file of a training checkpoint: `state`, and of each other file the size and a checksum."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path.stat().st_size for name, path in paths.items()}
    checksums = {name: checksum(path) for name, path in paths.items()}
    text = json.dumps({**state, "files": files, "checksums": checksums}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")


class Checkpoints:
    """Everything a later run needs to go on, to the bit; a folder appears when it is whole.

    Args:
        stage: that is trained.
        fingerprint: what has to be the same for the stage to go on.
    """

    def __init__(self, stage: Stage, fingerprint: dict[str, Any]):
        self.stage, self.fingerprint = stage, fingerprint
        self.folder = stage.output / "checkpoints"
        self.best: tuple[float, int] | None = None  # evaluation loss, step

    def save(self, step: int, progress: dict[str, Any], reader: dict[int, Any], describe: Any) -> Path:
        """Write a checkpoint; on all processes.

        Args:
            step: that is done.
            progress: what `load` gives back, as JSON holds it.
            reader: of a stream, where each worker of this process goes on.
            describe: writes the model's configuration and processor into a folder.

        Raises:
            NotWritten: for whatever the disk says; the folder is named.
        """
        folder = self.folder / f"{self.stage.name}-{step:07d}"
        with _named(folder):
            self._write(folder, step, progress, reader, describe)
        return folder

    def _write(self, folder: Path, step: int, progress: dict[str, Any], reader: dict[int, Any], describe: Any) -> None:
        accelerator = self.stage.accelerator
        unfinished = unfinished_folder(folder)
        if self.stage.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        if reader:
            (unfinished / self._reader_file).write_text(json.dumps(reader), encoding="utf-8")
        loss = progress["results"].get("eval_loss")
        if loss is not None and math.isfinite(loss) and (self.best is None or loss < self.best[0]):
            self.best = (loss, step)
        accelerator.wait_for_everyone()
        if self.stage.is_main:
            describe(unfinished)
            state = {"stage": self.stage.name, "step": step, "run": self.fingerprint, "best": self.best, **progress}
            write_state(unfinished, {"total_steps": STAGES.index(self.stage.name) * 10**9 + step, **state})
            commit_folder(unfinished, folder)
            self._rotate()
        accelerator.wait_for_everyone()

    def load(self, folder: Path) -> tuple[int, dict[str, Any], dict[int, Any]]:
        """Go on from a checkpoint: its step, progress, and where the workers of this process were.

        Raises:
            ValueError: where what decides the stage has changed; each difference is named.
        """
        state = read_state(folder)
        if changed := differences(state["run"], self.fingerprint):
            raise ValueError(
                f"{str(folder)!r} cannot be resumed with these options: {'; '.join(changed)}. Set them back (of "
                "batch_size, accumulation and processes the product is what counts), or choose another --output"
            )
        self.stage.accelerator.load_state(str(folder))
        self.best = None if state["best"] is None else tuple(state["best"])
        path = folder / self._reader_file
        reader = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        logger.info("Going on from step %d of stage %s, in %s.", state["step"], self.stage.name, folder)
        return state["step"], state, {int(worker): own for worker, own in reader.items()}

    @property
    def _reader_file(self) -> str:
        return f"reader-{self.stage.accelerator.process_index}.json"

    def _rotate(self) -> None:
        """Keep the newest checkpoints, and the best one of this stage."""
        folders = sorted(self.folder.glob(f"{self.stage.name}-*"))
        keep = {folder.name for folder in folders[-self.stage.config.keep_checkpoints :]}
        if self.best is not None:
            keep.add(f"{self.stage.name}-{self.best[1]:07d}")
        for folder in folders:
            if folder.name not in keep:
                shutil.rmtree(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; those that are torn or damaged are ignored with a warning."""
    for torn in folder.glob(f"{_UNFINISHED}*"):
        logger.warning("Ignoring %s: it was not finished when the run was stopped.", torn)
    whole = []
    for path in folder.glob("*/"):
        if path.name.startswith(_UNFINISHED):
            continue
        try:
            whole.append((read_state(path)["total_steps"], path))
        except ValueError as error:
            logger.warning("Ignoring %s: %s", path, error)
    for _, path in sorted(whole, reverse=True):
        try:
            read_state(path, whole=None)
            return path
        except ValueError as error:
            logger.warning("Ignoring %s: %s", path, error)
    return None


def save_adapters(model: PanoramaVLM, folder: Path, base: str | None, state_dict: dict[str, torch.Tensor]) -> None:
    """Write the LoRA adapters as peft writes them, and beside them what else was trained.

    Args:
        model: with adapters.
        folder: to write into; a folder around it may still be unfinished, which lies beside what it will be.
        base: what the adapters belong to; `from_checkpoint` loads it. A folder is named as it is found from `folder`:
            the name says nothing about the disk.
        state_dict: of the model.
    """
    adapters, prefix = model.model.language_model, "model.language_model."
    if base is not None and os.path.isdir(base):
        base = os.path.relpath(base, folder)
    adapters.peft_config["default"].base_model_name_or_path = base
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if "lora_" in name}
    adapters.save_pretrained(folder, state_dict=own, save_embedding_layers=False)
    passing = ("lora_", "label_head.")  # saved as adapters, and of training alone
    trains = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in passing)
    ]
    save_file({name: state_dict[name].contiguous().cpu() for name in trains}, folder / OTHER_PARTS)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
