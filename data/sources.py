"""Sources: folders, tables and Hub datasets, and what a row of them holds."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage

from ..processing_panorama import IMAGE_TOKEN

logger = logging.getLogger(__name__)


_KNOWN = {  # the columns that are found without being named, the first one there wins
    "image": ("image", "images", "file_name", "url", "image_path", "panorama"),
    "question": ("query", "question", "prompt", "instruction"),
    "answer": ("annotation", "answer", "response"),
    "conversation": ("conversations", "messages"),
}


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


_ERROR = "__error__"  # a column with what is wrong with a row of a text file


_BROKEN_ROW = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)  # what odd rows raise


RawSample = dict[str, Any]


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


@dataclass
class OpenedSource:
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


def open_source(source: DataSource, stage: str) -> OpenedSource:
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
    opened = OpenedSource(source, data, used, source.images or root)
    if isinstance(data, Dataset):
        files = [image for row in data.take(100) for image in try_panoramas(opened, row)]
        paths = [file for file in files if isinstance(file, str) and "://" not in file]
        if paths and len(paths) == len(files) and not any(map(os.path.isfile, paths)):
            raise ValueError(
                f"none of the first {len(paths)} images of {source.path!r} exists, such as {paths[0]!r}; "
                "`images` must name the folder they lie in"
            )
    return opened


def try_panoramas(opened: OpenedSource, row: dict[str, Any]) -> list[str | bytes]:
    """The images of a row; none where it is broken, which its collator reports."""
    try:
        return opened.panoramas(row)
    except _BROKEN_ROW:
        return []


_real_path = lru_cache(maxsize=100_000)(os.path.realpath)


def identity(image: str | bytes) -> str:
    """What tells panoramas apart: the file, or its content where the dataset holds it."""
    return _real_path(image) if isinstance(image, str) else hashlib.blake2b(image, digest_size=16).hexdigest()
