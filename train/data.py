"""Data: folders, tables and Hub datasets as the batches of each optimizer step, the same ones however they are spread.

`open_data` finds the samples, a `BatchStream` in a `DataLoader` orders and prepares them, `SkippedSamples` counts the
bad ones. What a step holds follows from the seed and the number of the step alone.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from PIL import Image as PILImage
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers.image_processing_utils import BatchFeature

from ..processing_panorama import IGNORE_INDEX, IMAGE_TOKEN, PanoramaProcessor

logger = logging.getLogger(__name__)

STAGES = ("vision", "resampler", "finetune")
_KNOWN = {  # the columns that are found without being named, the first one there wins
    "image": ("image", "images", "file_name", "url", "image_path", "panorama"),
    "question": ("query", "question", "prompt", "instruction"),
    "answer": ("annotation", "answer", "response"),
    "conversation": ("conversations", "messages"),
}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ERROR = "__error__"  # a column with what is wrong with a row of a text file
_STREAM_BUFFER = 200  # rows of a stream, with their undecoded images, among which the next one is drawn
_BAD_INPUT = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError),
    *(OSError, EOFError, SyntaxError, zlib.error, struct.error),
    *(PILImage.DecompressionBombError, TemplateError),
)  # what a broken image or a conversation that the chat template refuses raises

_BROKEN_ROW = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)  # what odd rows raise

RawSample = dict[str, Any]
Collate = Callable[[list[RawSample], list[dict[str, Any]]], "BatchFeature | None"]


@dataclass
class DataSource:
    """Where samples come from.

    Args:
        path: a folder (with `metadata.jsonl` or `metadata.csv`, of images, of parquet, or a saved dataset), a `.csv`
            (as QuIC-360: `url, query, annotation`), `.json` or `.jsonl` (as LLaVA: `image, conversations`) or
            `.parquet` file, or a dataset on the Hub.
        images: folder that relative image paths start from; the file's own without it. A URL in an image column names
            the file that ends it, in this folder.
        split, subset: of a saved or a Hub dataset; a folder's subfolder of the split's name wins over the folder.
        image_column, question_column, answer_column, conversation_column: found by their usual names without this.
        weight: how often each sample is seen in an epoch (0.5: a random half of them, a new one in each epoch). With
            a stream among the sources, its share of the samples, relative to the other weights.
        allow_outside: whether rows may name images outside the source's own folder (or `images`), by `../`, absolute
            paths or links.
        streaming: read while training instead of before; the number of samples is unknown then.
    """

    path: str
    images: str | None = None
    split: str = "train"
    subset: str | None = None
    image_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    conversation_column: str | None = None
    weight: float = 1.0
    streaming: bool = False
    allow_outside: bool = False


class BadSample(ValueError):
    """Why one sample cannot be used, as `kind: details`."""


# ---------------------------------------------------------------------------------------------------------- sources


@dataclass
class _Opened:
    """A source with its columns found; images are not decoded."""

    source: DataSource
    data: Dataset | IterableDataset
    columns: dict[str, str]  # what -> column
    root: str | None

    def panoramas(self, row: dict[str, Any]) -> list[str | bytes]:
        """The images of a row: paths, or the bytes of files."""
        if row.get(_ERROR):
            return []
        value = row.get(self.columns["image"])
        if isinstance(value, str) and value.startswith("["):
            value = json.loads(value)
        found: list[str | bytes] = []
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, dict):
                image = image.get("bytes") or image.get("path")
            if isinstance(image, str) and image.startswith(("http://", "https://")) and self.source.images:
                image = image.split("?")[0].rsplit("/", 1)[-1]
            if isinstance(image, str) and image and "://" not in image:
                image = self._allowed(os.path.join(self.root or "", image))
            if image is not None and not isinstance(image, str | bytes):
                raise BadSample(f"broken row: an image must be a path or bytes, got {type(image).__name__}")
            if image:
                found.append(image)
        return found

    def _allowed(self, path: str) -> str:
        """A path that the rows of this source may name: in its own folder, links resolved."""
        if self.source.allow_outside:
            return path
        cache = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)  # where Hub datasets lie
        folders = [_real_path(str(folder)) for folder in ([self.root] if self.root else cache)]
        real = _real_path(path)
        if not any(os.path.commonpath([real, folder]) == folder for folder in folders):
            raise BadSample(f"path outside: {path} does not lie in the folder of the source (see allow_outside)")
        return path

    def sample(self, row: dict[str, Any], stage: str, name: str, which: int = 0) -> RawSample:
        """What a collator needs of a row: `image` in stage `vision` (the one numbered `which`), else `messages`."""
        raw: RawSample = {"name": name, "source": self.source.path}
        try:
            if row.get(_ERROR):
                raise BadSample(f"broken row: {row[_ERROR]}")
            images = self.panoramas(row)
            if not images:
                raise BadSample(f"missing image: none in the column {self.columns['image']!r}")
            if stage == "vision":
                return {**raw, "image": images[which]}
            return {**raw, "messages": _messages(self._turns(row), images)}
        except _BROKEN_ROW as error:
            words = f"broken row: {type(error).__name__}: {error}"
            return {**raw, "error": str(error) if isinstance(error, BadSample) else words[:300]}

    def _turns(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if "conversation" not in self.columns:
            question, answer = (row.get(self.columns[what]) for what in ("question", "answer"))
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        turns = row.get(self.columns["conversation"])
        turns = json.loads(turns) if isinstance(turns, str) else turns
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadSample(f"broken row: {self.columns['conversation']!r} must be a list of turns")
        return turns


def _messages(turns: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """Turns `{"from", "value"}` or `{"role", "content"}` as messages that hold the images where `<image>` stands, or
    at the start of the first question where it stands nowhere."""
    texts: list[tuple[str, str]] = []
    for turn in turns:
        role = turn.get("from") or turn.get("role")
        if role not in _ROLES:
            raise BadSample(f"broken row: a turn is from {role!r}, it must be from one of {sorted(_ROLES)}")
        texts.append((_ROLES[role], _text_of(turn.get("value") or turn.get("content") or "")))
    if next((role for role, _ in texts if role != "system"), "user") != "user":
        raise BadSample("broken row: the conversation starts with the assistant; it must start with a question")
    if not any(IMAGE_TOKEN in text for _, text in texts):
        first = next((place for place, (role, _) in enumerate(texts) if role == "user"), None)
        if first is not None:
            texts[first] = ("user", IMAGE_TOKEN * len(images) + texts[first][1])
    if (found := sum(text.count(IMAGE_TOKEN) for _, text in texts)) != len(images):
        raise BadSample(f"number of {IMAGE_TOKEN}: the texts have {found}, the sample has {len(images)} images")
    remaining = iter(images)
    messages = []
    for role, text in texts:
        parts: list[dict[str, Any]] = []
        for piece in re.split(f"({re.escape(IMAGE_TOKEN)})", text):
            if piece == IMAGE_TOKEN:
                parts.append({"type": "image", "image": next(remaining)})
            elif piece.strip():
                parts.append({"type": "text", "text": piece.strip("\n")})
        messages.append({"role": role, "content": parts})
    return messages


def _text_of(content: Any) -> str:
    """The text of a turn, `<image>` for each image in it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadSample(f"broken row: a turn must hold a string or a list of parts, got {str(content)[:80]!r}")
    texts = []
    for part in content:
        if part.get("type") not in ("image", "text"):
            raise BadSample(f"broken row: a part of a turn must be of type image or text, got {str(part)[:80]!r}")
        text = IMAGE_TOKEN if part["type"] == "image" else part.get("text") or ""
        if not isinstance(text, str):
            raise BadSample(f"broken row: a text must be a string, got {str(text)[:80]!r}")
        texts.append(text)
    return "".join(texts)


def conversation(image: Any, query: str, annotation: str | None = None, **_: Any) -> list[dict[str, Any]]:
    """The messages of one sample; without an annotation, only the question."""
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": query}]}]
    if annotation is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": annotation}]})
    return messages


def _text_rows(path: str) -> Iterator[dict[str, str | None]]:
    """Rows of a .csv, .json (a list) or .jsonl file. Values are strings, lists and objects as JSON; a row that cannot
    be read has its reason in the column `_ERROR`."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        if path.endswith(".csv"):
            for row in csv.DictReader(file):
                yield {_ERROR: f"it has more fields than the header: {row[None]}"} if None in row else row
            return
        is_list = path.endswith(".json") and file.read(1000).lstrip().startswith("[")
        file.seek(0)
        for item in json.load(file) if is_list else filter(str.strip, file):
            try:
                fields = item if is_list else json.loads(item)
                if not isinstance(fields, dict):
                    raise ValueError(f"it must be a JSON object, got {str(item)[:80]!r}")
                yield {k: v if v is None or isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
            except (ValueError, RecursionError) as error:
                yield {_ERROR: str(error)}


def _read(source: DataSource) -> tuple[Dataset | IterableDataset, str | None]:
    """The rows of a source, and the folder that its relative image paths start from."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = load_from_disk(str(path))
            if isinstance(saved, DatasetDict):
                if source.split not in saved:
                    raise ValueError(f"it has no split {source.split!r}, only {sorted(saved)}")
                saved = saved[source.split]
            return (saved.to_iterable_dataset() if source.streaming else saved), str(path)
        folder = path / source.split if (path / source.split).is_dir() else path
        metadata = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
        if not metadata:
            if any(path.rglob("*.parquet")):
                return load_dataset(str(path), split=source.split, streaming=source.streaming), str(folder)
            endings = PILImage.registered_extensions()
            files = sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in endings)
            if not files:
                raise ValueError("the folder has no metadata.jsonl, metadata.csv, images, parquet or saved dataset")
            rows = Dataset.from_dict({"image": files})
            return (rows.to_iterable_dataset() if source.streaming else rows), str(folder)
        path = metadata[0]
    if path.is_file():
        if path.suffix == ".parquet":
            data = load_dataset("parquet", data_files=str(path), split="train", streaming=source.streaming)
            return data, str(path.parent)
        if path.suffix not in (".csv", ".json", ".jsonl"):
            raise ValueError("a file must end in .csv, .json, .jsonl or .parquet")
        if source.streaming:
            return IterableDataset.from_generator(_text_rows, gen_kwargs={"path": str(path)}), str(path.parent)
        text = list(_text_rows(str(path)))
        columns = list(dict.fromkeys(key for row in text for key in row))
        features = Features({column: Value("string") for column in columns})
        values = {column: [row.get(column) for row in text] for column in columns}
        return Dataset.from_dict(values, features=features), str(path.parent)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.path):
        raise ValueError("there is no such file or folder, and it is no name of a Hub dataset (org/name)")
    try:
        return load_dataset(source.path, source.subset, split=source.split, streaming=source.streaming), None
    except (OSError, DatasetsError) as error:
        raise ValueError(
            f"there is no such file or folder, and the Hub does not give such a dataset: {error}"
        ) from error


def _open(source: DataSource, stage: str) -> _Opened:
    """A source with its columns; what is wrong with it as a whole is a `ValueError` that names it."""
    if not source.weight > 0:
        raise ValueError(f"the weight of {source.path!r} must be positive, got {source.weight}. Typical value: 1.0")
    try:
        data, root = _read(source)
        first = list(data.take(100)) if data.column_names is None else []
    except (ValueError, OSError, RecursionError, csv.Error, DatasetsError) as error:
        raise ValueError(f"cannot read {source.path!r}: {error}") from error
    there = data.column_names or list(dict.fromkeys(key for row in first for key in row))
    if (isinstance(data, Dataset) and len(data) == 0) or not there:
        raise ValueError(f"{source.path!r} has no samples; at least one is needed")
    columns: dict[str, str] = {}
    for what, known in _KNOWN.items():
        named = getattr(source, f"{what}_column")
        if named and named not in there:
            raise ValueError(f"{source.path!r} has no {what}_column {named!r}, its columns are {there}")
        if found := [name for name in ([named] if named else known) if name in there]:
            columns[what] = found[0]
    for name, kind in (data.features or {}).items():
        if isinstance(kind, Image):
            columns.setdefault("image", name)
    text = () if stage == "vision" else ("conversation",) if "conversation" in columns else ("question", "answer")
    if missing := [what for what in ("image", *text) if what not in columns]:
        names = "; ".join(f"{what} ({' or '.join(known)})" for what, known in _KNOWN.items())
        raise ValueError(
            f"{source.path!r} has the columns {[name for name in there if name != _ERROR]} and lacks {missing}. "
            f"Known names: {names}. A conversation stands for question and answer; "
            "image_column, question_column, answer_column and conversation_column name others"
        )
    used = {what: columns[what] for what in ("image", *text)}
    if data.column_names is not None:
        data = data.select_columns([name for name in (*used.values(), _ERROR) if name in there])
    kind = (data.features or {}).get(used["image"])
    if isinstance(kind, Image):
        data = data.cast_column(used["image"], Image(decode=False))
    elif isinstance(getattr(kind, "feature", None), Image):
        data = data.cast_column(used["image"], List(Image(decode=False)))
    opened = _Opened(source, data, used, source.images or root)
    if isinstance(data, Dataset):
        files = [image for row in data.take(100) for image in _try_panoramas(opened, row)]
        paths = [file for file in files if isinstance(file, str) and "://" not in file]
        if paths and len(paths) == len(files) and not any(map(os.path.isfile, paths)):
            raise ValueError(
                f"none of the first {len(paths)} images of {source.path!r} exists, such as {paths[0]!r}; "
                "`images` must name the folder they lie in"
            )
    return opened


def _try_panoramas(opened: _Opened, row: dict[str, Any]) -> list[str | bytes]:
    """The images of a row; none where it is broken, which its collator reports."""
    try:
        return opened.panoramas(row)
    except _BROKEN_ROW:
        return []


_real_path = lru_cache(maxsize=100_000)(os.path.realpath)


def _identity(image: str | bytes) -> str:
    """What tells panoramas apart: the file, or its content where the dataset holds it."""
    return _real_path(image) if isinstance(image, str) else hashlib.blake2b(image, digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------------- samples


def open_data(
    sources: Sequence[DataSource], *, stage: str, seed: int, validation_share: float = 0.0
) -> tuple[Samples, Samples | None]:
    """Find the samples for training and validation.

    Args:
        sources: what is mixed.
        stage: in `vision` each distinct panorama is one sample, and needs no text.
        seed: of the split.
        validation_share: the share of the panoramas that is kept for validation, in [0, 1); a panorama and all that is
            said of it is in one of the two. Panoramas are the same where their file is (or its content, for images that
            a dataset holds).

    Raises:
        ValueError: for what is wrong as a whole: no such file, columns missing, no samples. A bad row is skipped later.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share must be in [0, 1), got {validation_share}. Typical value: 0.05")
    if not sources:
        raise ValueError("sources is empty: give at least one DataSource")
    opened = [_open(source, stage) for source in sources]
    if any(isinstance(each.data, IterableDataset) for each in opened):
        limit = int(validation_share * 2**64)
        train = Samples(opened, stage, held_out=(seed, limit, False))
        return train, Samples(opened, stage, held_out=(seed, limit, True)) if limit else None

    # The rows of each panorama. Without a split or duplicates to find, images are not read.
    rows: list[list[list[str]]] = [[[] for _ in range(len(each.data))] for each in opened]
    if stage == "vision" or validation_share:
        images = [each.data.select_columns([each.columns["image"]]) for each in opened]
        rows = [
            [[_identity(image) for image in _try_panoramas(each, row)] for row in of_source]
            for each, of_source in zip(opened, images, strict=True)
        ]
    panoramas = sorted({name for of_source in rows for names in of_source for name in names})
    held: set[str] = set()
    if validation_share:
        count = max(1, round(validation_share * len(panoramas)))
        if count >= len(panoramas):
            raise ValueError(
                f"validation_share={validation_share} of {len(panoramas)} panoramas leaves none to train on; "
                "give more panoramas or a smaller share"
            )
        held = {panoramas[place] for place in np.random.default_rng(seed).permutation(len(panoramas))[:count]}
    train_entries: list[tuple[int, int, int]] = []
    validation_entries: list[tuple[int, int, int]] = []
    seen: set[str] = set()
    for source, of_source in enumerate(rows):
        for row, names in enumerate(of_source):
            if stage == "vision":
                for which, name in enumerate(names):
                    if name not in seen:
                        (validation_entries if name in held else train_entries).append((source, row, which))
                        seen.add(name)
                if not names:  # to be reported
                    train_entries.append((source, row, 0))
            elif not held.intersection(names):
                train_entries.append((source, row, 0))
            elif held.issuperset(names):
                validation_entries.append((source, row, 0))  # a row with panoramas of both sides is in neither
    train = Samples(opened, stage, train_entries)
    return train, Samples(opened, stage, validation_entries, weighted=False) if held else None


class Samples:
    """Samples of one or more sources, read when asked for, their images undecoded.

    Map-style: `len(samples)` distinct samples, `samples[i]`. With a stream among the sources: no length, `stream()`.
    A raw sample is a dict of `image` (stage `vision`) or `messages`, `name`, `source`, `index` and, where it cannot be
    used, `error`.
    """

    def __init__(
        self,
        opened: list[_Opened],
        stage: str,
        entries: list[tuple[int, int, int]] | None = None,
        held_out: tuple[int, int, bool] = (0, 0, False),
        weighted: bool = True,
    ):
        self.opened = opened
        self.stage = stage
        self.streaming = entries is None
        self.entries = np.array(entries or [], dtype=np.int64).reshape(-1, 3)  # [N, (source, row, image of the row)]
        self.held_out = held_out  # for streams: seed, limit of the hash, on which side of it
        self.weighted = weighted

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a stream has no length")
        return len(self.entries)

    def __getitem__(self, index: int) -> RawSample:
        """Sample `index % len(self)`; higher indices are its repetitions in an epoch."""
        source, row, which = (int(number) for number in self.entries[index % len(self)])
        opened = self.opened[source]
        return {**opened.sample(opened.data[row], self.stage, f"row {row}", which), "index": index}

    def __iter__(self) -> Iterator[RawSample]:
        """All samples once; of a stream, without end."""
        if self.streaming:
            return (pickle.loads(row["sample"]) for row in self.stream(0, shuffle=False))
        return (self[index] for index in range(len(self)))

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch, in order: each sample as often as its source's weight says."""
        generator = np.random.default_rng((seed, epoch, 0))
        indices = []
        for source, opened in enumerate(self.opened):
            own = np.flatnonzero(self.entries[:, 0] == source)
            times, share = divmod(opened.source.weight if self.weighted else 1.0, 1)
            indices += [own + len(self) * time for time in range(int(times))]
            drawn = generator.choice(own, round(share * len(own)), replace=False)
            indices.append(np.sort(drawn) + len(self) * int(times))
        return np.concatenate(indices)

    def lengths(self) -> np.ndarray:
        """Characters of the texts of each sample, [N]; zeros in stage `vision`."""
        lengths = np.zeros(len(self), dtype=np.int64)
        for source, opened in enumerate(self.opened):
            text = [column for what, column in opened.columns.items() if what != "image"]
            if text:
                sizes = np.array([sum(len(str(v)) for v in row.values()) for row in opened.data.select_columns(text)])
                own = self.entries[:, 0] == source
                lengths[own] = sizes[self.entries[own, 1]]
        return lengths

    def stream(self, seed: int, shuffle: bool = True) -> IterableDataset:
        """The samples without end, each pickled under the key `sample` (so that `datasets` does not force them into one
        schema): pass after pass, shuffled anew in each, drawn from the sources by their weights. A sample carries its
        pass as `epoch`."""
        streams = [
            IterableDataset.from_generator(partial(_passes, opened, self.stage, self.held_out, seed, shuffle))
            for opened in self.opened
        ]
        weights = np.array([opened.source.weight for opened in self.opened])
        return interleave_datasets(streams, probabilities=list(weights / weights.sum()), seed=seed)


def _passes(
    opened: _Opened, stage: str, held_out: tuple[int, int, bool], seed: int, shuffle: bool
) -> Iterator[dict[str, bytes]]:
    """A source as an endless stream. Each worker reads all of it (`iter` does not share it out among workers), so that
    the order does not depend on their number."""
    split_seed, limit, held = held_out
    rows = opened.data if isinstance(opened.data, IterableDataset) else opened.data.to_iterable_dataset()
    for number in itertools.count():
        shuffled = rows.shuffle(seed=seed + number, buffer_size=_STREAM_BUFFER) if shuffle else rows
        seen: set[str] = set()
        given = False
        for place, columns in enumerate(shuffled.iter(batch_size=1)):
            row = {column: values[0] for column, values in columns.items()}
            names = [_identity(image) for image in _try_panoramas(opened, row)]
            hashes = [hashlib.blake2b(f"{split_seed} {name}".encode(), digest_size=8).digest() for name in names]
            sides = [int.from_bytes(each, "big") < limit for each in hashes] or [False]
            if stage == "vision":
                new = [i for i, side in enumerate(sides) if side == held and not (names and names[i] in seen)]
                seen.update(names)
            else:
                new = [0] if set(sides) == {held} else []  # a row with panoramas of both sides is in neither
            for which in new:
                given = True
                raw = opened.sample(row, stage, f"row {place} of pass {number}", which)
                yield {"sample": pickle.dumps({**raw, "epoch": number})}
        if not given:
            raise ValueError(f"{opened.source.path!r} has no samples for {'validation' if held else 'training'}")


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass
class Step:
    """What one process needs for one optimizer step.

    Attributes:
        index: of the step, from 0.
        epoch: passes over the data that lie before it (whole ones for a stream).
        micro_batches: inputs of the model, [batch_size or less, ...]; none where all samples of this process are bad.
        skipped: the bad samples: `{"sample", "source", "reason", "step"}`.
        samples: good ones in `micro_batches`.
        seen: good and bad ones in the step, on all processes.
    """

    index: int
    epoch: float
    micro_batches: list[BatchFeature] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    samples: int = 0
    seen: int = 0

    def pin_memory(self) -> Step:
        """The same, in memory from which a GPU copies while it computes; `DataLoader` calls it."""
        batches = [BatchFeature({name: value.pin_memory() for name, value in b.items()}) for b in self.micro_batches]
        return replace(self, micro_batches=batches)


class BatchStream(torch.utils.data.IterableDataset):
    """The optimizer steps of a run, for `DataLoader(stream, batch_size=None, num_workers=n)`.

    A step takes `batch_size * world * accumulation` samples, the last one of an epoch what is left. Which ones and in
    which order follows from the seed and the step alone: sample j goes to process j % world, so neither processes,
    workers, accumulation nor a restart change what is learned from. Each step is made by one worker.

    Args:
        samples: of `open_data`.
        collate: a `VisionCollator` or `ConversationCollator`.
        batch_size: samples a process and micro-batch.
        accumulation: micro-batches a step.
        rank, world: this process, and how many there are.
        seed: of order and augmentation.
        epochs: passes over the samples, where `max_steps` does not say how many steps there are.
        max_steps: optimizer steps; a stream needs it.
        start_step: steps before it are not made. Samples of a stream are read again up to there, but not prepared.
        shuffle: a new order in each epoch.
        group_by_length: let the samples of a step be of similar length.
    """

    def __init__(
        self,
        samples: Samples,
        collate: Collate,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        epochs: float | None = 1.0,
        max_steps: int | None = None,
        start_step: int = 0,
        shuffle: bool = True,
        group_by_length: bool = False,
    ):
        if batch_size < 1 or accumulation < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size and accumulation must be at least 1 and rank in [0, world), got {batch_size}, "
                f"{accumulation} and rank {rank} of {world}"
            )
        if max_steps is None and (samples.streaming or not epochs):
            raise ValueError(
                "max_steps must say how many steps there are: "
                + ("a stream has no known length" if samples.streaming else f"epochs is {epochs}")
            )
        if samples.streaming and group_by_length:
            raise ValueError("group_by_length needs samples of known length, not a stream; leave it out")
        self.samples, self.collate = samples, collate
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.seed, self.start_step, self.shuffle = seed, start_step, shuffle
        self.global_batch = batch_size * world * accumulation
        self.lengths = samples.lengths() if group_by_length else None
        self.epoch_samples = 0 if samples.streaming else len(samples.epoch(seed, 0))  # 0: not known
        if not samples.streaming and self.epoch_samples == 0:
            raise ValueError("an epoch has no samples; raise the weights of the sources")
        whole, part = divmod(epochs or 0.0, 1)
        in_epochs = int(whole) * self.epoch_steps + math.ceil(round(part * self.epoch_steps, 6))
        self.steps = in_epochs if max_steps is None else max_steps

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps an epoch."""
        return math.ceil(self.epoch_samples / self.global_batch)

    def seen_before(self, step: int) -> int:
        """How many samples, on all processes, the steps before this one hold."""
        if self.samples.streaming:
            return step * self.global_batch
        epoch, within = divmod(step, self.epoch_steps)
        return epoch * self.epoch_samples + min(within * self.global_batch, self.epoch_samples)

    def __iter__(self) -> Iterator[Step]:
        info = get_worker_info()
        first, stride = (0, 1) if info is None else (info.id, info.num_workers)
        for step, epoch, seen, raw in self._shares(self.start_step + first, stride):
            made = Step(step, epoch, seen=seen)
            for start in range(0, len(raw), self.batch_size):
                part = raw[start : start + self.batch_size]
                bad: list[dict[str, Any]] = []
                batch = self.collate(part, bad)
                made.skipped += [{**record, "step": step} for record in bad]
                made.samples += len(part) - len(bad)
                if batch is not None:
                    made.micro_batches.append(batch)
            yield made

    def _shares(self, first: int, stride: int) -> Iterator[tuple[int, float, int, list[RawSample]]]:
        """Every `stride`-th step: its number, epoch, samples on all processes, and the raw ones of this process."""
        mine = slice(self.rank, None, self.world)
        if self.samples.streaming:
            ahead = self.samples.stream(self.seed, self.shuffle).skip(self.start_step * self.global_batch)
            batches = ahead.iter(batch_size=self.global_batch)
            for step, rows in zip(range(self.start_step, self.steps), batches, strict=False):
                if (step - first) % stride == 0:
                    raw = [pickle.loads(row) for row in rows["sample"]]
                    raw = [{**sample, "index": step * self.global_batch + j} for j, sample in enumerate(raw)]
                    yield step, float(raw[0]["epoch"]), len(raw), raw[mine]
            return
        order, current = np.empty(0, dtype=np.int64), -1
        for step in range(first, self.steps, stride):
            epoch, within = divmod(step, self.epoch_steps)
            if epoch != current:
                order, current = self._order(epoch), epoch
            batch = order[within * self.global_batch : (within + 1) * self.global_batch]
            raw = [{**self.samples[int(index)], "epoch": epoch} for index in batch[mine]]
            yield step, step / self.epoch_steps, len(batch), raw

    def _order(self, epoch: int) -> np.ndarray:
        """The indices of an epoch in the order they are seen."""
        indices = self.samples.epoch(self.seed, epoch)
        generator = np.random.default_rng((self.seed, epoch, 1))
        if self.shuffle:
            indices = generator.permutation(indices)
        if self.lengths is not None:
            # Sort pools of 50 batches by length, then shuffle the batches; the one that is not full stays last.
            pools = np.split(indices, range(50 * self.global_batch, len(indices), 50 * self.global_batch))
            lengths = self.lengths
            pools = [pool[np.argsort(lengths[pool % len(lengths)], kind="stable")] for pool in pools]
            full = len(indices) // self.global_batch * self.global_batch
            indices = np.concatenate(pools)
            batches = indices[:full].reshape(-1, self.global_batch)
            batches = generator.permutation(batches) if self.shuffle else batches
            indices = np.concatenate([batches.ravel(), indices[full:]])
        return indices


class _Collator:
    """Prepare samples one by one, so that a bad one does not spoil its batch, and pad the good ones on the right.

    `collate(samples, skipped)` gives a batch, `None` where no sample is good, and appends to `skipped` a record
    `{"sample", "source", "reason"}` for each bad one; without the list a bad sample is a :class:`BadSample`.
    """

    def __init__(self, processor: PanoramaProcessor, cache_dir: str | os.PathLike[str] | None = None):
        self.processor = copy.copy(processor)
        if cache_dir is not None:
            self.processor.image_processor = copy.copy(processor.image_processor)
            self.processor.image_processor.cache_dir = cache_dir
        self.warned: set[tuple[str, int]] = set()
        self.neighbours = processor.image_processor.view_plan.neighbours()

    def check_comparable(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Raise :class:`BadSample` where no two neighbouring views show what the camera saw."""
        masks = inputs.get("view_mask", ())
        if len(masks) and not any(mask[first] and mask[second] for mask in masks for first, second in self.neighbours):
            raise BadSample("nothing to compare: no two neighbouring views show what the camera saw")

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        """The inputs of one sample, with a leading dimension of 1 (or its number of panoramas)."""
        raise NotImplementedError

    def __call__(self, samples: list[RawSample], skipped: list[dict[str, Any]] | None = None) -> BatchFeature | None:
        good = []
        for sample in samples:
            try:
                if "error" in sample:
                    raise BadSample(sample["error"])
                with self._each_warning_once():
                    good.append(self.prepare(sample))
            except _BAD_INPUT as error:
                reason = str(error)
                if not isinstance(error, BadSample):
                    of_image = not isinstance(error, ValueError | TypeError | TemplateError) or "cannot read" in reason
                    files = ", ".join(image if isinstance(image, str) else "in bytes" for image in _images(sample))
                    reason = f"{'unreadable image' if of_image else 'unusable sample'}: {files}: {reason}"
                if skipped is None:
                    raise BadSample(reason) from error
                skipped.append({"sample": sample.get("name"), "source": sample.get("source"), "reason": reason})
        if not good:
            return None
        batch = {"pixel_values": torch.cat([each["pixel_values"] for each in good])}  # [panoramas, V, 3, H, W]
        if any("view_mask" in each for each in good):
            masks = [
                each.get("view_mask", torch.ones(each["pixel_values"].shape[:2], dtype=torch.bool)) for each in good
            ]
            batch["view_mask"] = torch.cat(masks)  # [panoramas, V]
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        for name, value in padding.items():
            if name in good[0]:
                rows = [each[name][0] for each in good]
                batch[name] = pad_sequence(rows, batch_first=True, padding_value=value)  # [B, T]
        return BatchFeature(batch)

    @contextmanager
    def _each_warning_once(self) -> Iterator[None]:
        """Let a warning through the first time that its line gives one: images differ, and so do the messages."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            place = (warning.filename, warning.lineno)
            if place not in self.warned:
                self.warned.add(place)
                warnings.warn_explicit(warning.message, warning.category, *place)


class VisionCollator(_Collator):
    """Batches of stage `vision`: `pixel_values` (and `view_mask`) of panoramas, each turned to a random heading that
    follows from the seed, the epoch and the sample.

    Args:
        processor: of the model.
        seed: of the headings.
        cache_dir: folder for prepared views; headings are multiples of 45 degrees then (else of 1).
        random_heading: turn the panoramas.
    """

    def __init__(
        self,
        processor: PanoramaProcessor,
        seed: int,
        cache_dir: str | os.PathLike[str] | None = None,
        random_heading: bool = True,
    ):
        super().__init__(processor, cache_dir)
        self.seed, self.random_heading = seed, random_heading
        self.step_deg = 1 if cache_dir is None else 45

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        options = {}
        if self.random_heading:
            generator = np.random.default_rng((self.seed, sample.get("epoch", 0), sample.get("index", 0)))
            options["yaw_offsets"] = [float(self.step_deg * generator.integers(360 // self.step_deg))]
        image = _present(sample["image"], sample.get("source"))
        inputs = self.processor.image_processor(images=[image], return_tensors="pt", **options)
        self.check_comparable(inputs)
        return inputs


class ConversationCollator(_Collator):
    """Batches of the later stages: `input_ids`, `attention_mask`, `labels`, `pixel_values` (and `view_mask`) of
    conversations about panoramas.

    Args:
        processor: of the model. Samples of more than its `max_text_length` text tokens are skipped, not cut.
        cache_dir: folder for prepared views.
        compares: whether the overlap loss is part of the stage: samples without anything to compare are skipped.
    """

    def __init__(
        self,
        processor: PanoramaProcessor,
        cache_dir: str | os.PathLike[str] | None = None,
        compares: bool = False,
    ):
        super().__init__(processor, cache_dir)
        self.compares = compares
        self.max_text_length = processor.max_text_length
        self.processor.max_text_length = sys.maxsize

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        messages: list[dict[str, Any]] = []
        for message in sample["messages"] if "messages" in sample else conversation(**sample):
            parts = [
                {**part, "image": _present(part["image"], sample.get("source"))} if part["type"] == "image" else part
                for part in message["content"]
            ]
            if message["role"] != "system" and not any((part.get("text") or "").strip() for part in parts):
                kind = "question" if message["role"] == "user" else "answer"
                raise BadSample(f"empty {kind}: in turn {len(messages) + 1}")
            messages.append({**message, "content": parts})
        if not any(message["role"] == "assistant" for message in messages):
            raise BadSample("no answer: there is no turn of the assistant to learn from")
        inputs = self.processor.apply_chat_template([messages], return_labels=True)
        length = int((inputs["input_ids"] != self.processor.image_token_id).sum())
        if length > self.max_text_length:
            raise BadSample(f"too long: {length} text tokens, at most max_text_length={self.max_text_length} are used")
        if self.compares:
            self.check_comparable(inputs)
        return inputs


def _images(sample: RawSample) -> list[Any]:
    parts = [part for message in sample.get("messages", []) for part in message["content"]]
    return [sample["image"]] if "image" in sample else [part["image"] for part in parts if part["type"] == "image"]


def _present(image: Any, source: str | None) -> Any:
    """The image, if it is there; a file of the Hub dataset that is streamed is fetched, and nothing else that has a
    protocol: rows come from outside."""
    if isinstance(image, str):
        if image.startswith(("http://", "https://")):
            raise BadSample(f"missing image: {image} is a URL; download it and name its folder with `images`")
        if "://" in image and not (
            re.match(rf"hf://datasets/{re.escape(source or '')}[@/]", image) and "::" not in image
        ):
            raise BadSample(f"missing image: {image} has a protocol that is not read; download it")
        if "://" in image:
            with fsspec.open(image, "rb") as file:
                return file.read()
        if not os.path.isfile(image):
            raise BadSample(f"missing image: {image} does not exist")
    return image


# ------------------------------------------------------------------------------------------------------ bad samples


class TooManyBadSamples(RuntimeError):
    """More samples than allowed could not be used."""


class SkippedSamples:
    """Counts and lists bad samples.

    Args:
        path: `skipped.jsonl`, to which records are appended.
        max_share: bad samples among all, above which the run fails, in [0, 1].
        minimum: samples seen before it may fail.
        write: whether this process writes; all of them should count, so that all of them stop.
    """

    def __init__(self, path: str | os.PathLike[str], max_share: float = 0.1, minimum: int = 20, write: bool = True):
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must be in [0, 1], got {max_share}. Typical value: 0.1")
        self.path, self.max_share, self.minimum, self.write = Path(path), max_share, minimum, write
        self.bad = self.seen = 0
        self.kinds: Counter[str] = Counter()

    def add(self, records: Sequence[dict[str, Any]], seen: int) -> None:
        """Take in the records of a step, of all processes, with the number of good and bad samples in it.

        Raises:
            TooManyBadSamples: when the share of bad samples is above `max_share`.
        """
        known = set(self.kinds)
        self._count(records, seen)
        if self.write:
            for record in records:
                if (kind := record["reason"].split(":")[0]) not in known:
                    known.add(kind)
                    logger.warning("A sample is left out, as others like it will be: %s", record["reason"])
        if records and self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        if self.seen >= self.minimum and self.bad > self.max_share * self.seen:
            common = "; ".join(f"{kind} ({count})" for kind, count in self.kinds.most_common(3))
            raise TooManyBadSamples(
                f"{self.bad} of {self.seen} samples could not be used, more than the allowed share of "
                f"{self.max_share:g}. Commonest reasons: {common}. Each is listed in {str(self.path)!r}; "
                "mend the data or allow a larger share"
            )

    def summary(self) -> str:
        """How many samples were left out, why, and where they are listed; nothing where none was."""
        if not self.bad:
            return ""
        kinds = "; ".join(f"{kind} ({count})" for kind, count in self.kinds.most_common())
        return f"{self.bad} of {self.seen} samples could not be used: {kinds}. Each is listed in {str(self.path)!r}"

    def rewind(self, step: int, seen: int = 0) -> None:
        """Forget the records from this step on, when a run goes on from there.

        Args:
            step: the first one that is made again.
            seen: samples before it (`BatchStream.seen_before`); with 0 the counting starts anew.
        """
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off when the run was killed
                continue
            if record["step"] < step:
                kept.append(record)
        self.bad = self.seen = 0
        self.kinds.clear()
        self._count(kept if seen else [], seen)
        if self.write and self.path.is_file():
            unfinished = self.path.with_suffix(".tmp")
            unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(unfinished, self.path)

    def _count(self, records: Sequence[dict[str, Any]], seen: int) -> None:
        self.bad += len(records)
        self.seen += seen
        self.kinds.update(record["reason"].split(":")[0] for record in records)
