"""Sources: folders, tables and Hub datasets, and what a row of them holds."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    List,
    load_dataset,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError

from ..projections_panorama import Projection
from ..synthetic.write import SYNTHETIC, World, parse_world, warn_without_cutouts
from .augmentation import KNOWLEDGE, RULES, knowledge_of
from .files import existing, list_folder, names_in_url, panoramas_in, said_of, spellings
from .label_maps import LabelColumn
from .rows import ERROR, LISTS, BadSample, RawSample, messages_of, references_of, text_rows, text_table

logger = logging.getLogger(__name__)


_KNOWN = {  # the columns that are found without being named, the first one there wins
    "image": ("image", "images", "file_name", "url", "image_path", "panorama"),
    "question": ("query", "question", "prompt", "instruction"),
    "answer": ("annotation", "answer", "response"),
    "conversation": ("conversations", "messages"),
    "tables": ("tables",),
}


BROKEN_ROW = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)  # what odd rows raise


@dataclass
class DataSource:
    """Where samples come from.

    Args:
        path: a folder (with `metadata.jsonl` or `metadata.csv`, of images, of parquet, or a saved dataset), a `.csv` or
            `.tsv` (as QuIC-360: `url, query, annotation`), `.json` or `.jsonl` (as LLaVA: `image, conversations`) or
            `.parquet` file, or a dataset on the Hub; `synthetic://?scenes=N&seed=S` renders scenes while training, with
            the options of `python -m panorama_vlm.synthetic` (`width`, `questions`, `kinds`, `backgrounds`).
        images: folder that relative image paths start from; the file's own without it. A URL in an image column names
            the file that ends it, in this folder.
        split, subset: of a saved or a Hub dataset; a folder's subfolder of the split's name wins over the folder.
        image_column, question_column, answer_column, conversation_column, tables_column: found by their usual names
            without this. An answer that is a list of texts is several that are right, one of which is drawn each time.
            `tables` are further conversations about the panorama, a list of lists of turns.
        weight: how often each sample is seen in an epoch (0.5: a random half of them, a new one in each epoch). With
            a stream among the sources, its share of the samples, relative to the other weights.
        fetch: whether images that rows name by http or https are fetched (once, then they lie in the cache of
            `datasets`): at most 256 MiB each, within a minute, from public addresses alone.
        private_hosts: names of hosts that may have other addresses.
        labels: what columns say of each pixel, for token labels: field -> `{column, classes, unknown}`, see
            :class:`LabelColumn`.
        things_column: of images that hold a number for each single thing, 0 where none is; the places of token labels
            follow from it.
        allow_outside: whether rows may name images outside the source's own folder (or `images`), by `../`, absolute
            paths or links.
        projection: what its images are, where they are not equirectangular, as of the image processor, such as
            `cubemap_3x2` or `dual_fisheye:fov=190`.
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
    tables_column: str | None = None
    weight: float = 1.0
    streaming: bool = False
    allow_outside: bool = False
    fetch: bool = False
    private_hosts: list[str] = field(default_factory=list)
    labels: dict[str, LabelColumn] = field(default_factory=dict)
    things_column: str | None = None
    projection: str | None = None


@dataclass
class OpenedSource:
    """A source with its columns found; images are not decoded."""

    source: DataSource
    data: Dataset | IterableDataset
    columns: dict[str, str]  # what -> column
    root: str | None
    folders: tuple[str, ...] = ()  # where rows may name files
    known: tuple[str, ...] = ()  # columns that say what turning, mirroring and tilting do to each question

    @property
    def label_fields(self) -> dict[str, int]:
        """How many classes each field of token labels has; none where the source knows nothing of directions."""
        return {name: column.classes for name, column in self.source.labels.items()}

    def _labels(self, row: dict[str, Any]) -> dict[str, Any]:
        """The files of the token labels of a row, for the collator that needs them."""
        source = self.source
        if not source.labels and source.things_column is None:
            return {}
        named = {name: (self._file(row, column.column), column) for name, column in source.labels.items()}
        return {"label_files": {"classes": named, "things": self._file(row, source.things_column)}}

    def _file(self, row: dict[str, Any], column: str | None) -> str | bytes | None:
        if column is None:
            return None
        value = row.get(column)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            return self._found([value], value)
        return value or None  # of what is no file the reader of labels says so

    def panoramas(self, row: dict[str, Any]) -> list[str | bytes]:
        """The images of a row: paths, or the bytes of files."""
        if row.get(ERROR):
            return []
        value = row.get(self.columns["image"])
        if isinstance(value, str) and value.startswith("["):
            value = _names_in(value)
        found: list[str | bytes] = []
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, dict):
                image = image.get("bytes") or image.get("path")
            if isinstance(image, str) and image.startswith(("http://", "https://")) and self.source.images:
                image = self._found(names_in_url(image), image)
            elif isinstance(image, str) and image and "://" not in image:
                image = self._found([image], image)
            if image is not None and not isinstance(image, str | bytes):
                raise BadSample(f"broken row: an image must be a path or bytes, got {type(image).__name__}")
            if image:
                found.append(image)
        return found

    def _found(self, names: list[str], said: str) -> str:
        """The file of the first of these names that there is; of none the first, to be reported."""
        paths = [self._allowed(os.path.join(self.root or "", form)) for name in names for form in spellings(name)]
        if not paths:
            raise BadSample(f"missing image: {said} names no file")
        return paths[0] if len(paths) == 1 else next(filter(os.path.isfile, paths), paths[0])

    def _allowed(self, path: str) -> str:
        """A path that the rows of this source may name: in its own folder, links resolved."""
        if self.source.allow_outside:
            return path
        cache = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)  # where Hub datasets lie
        folders = [_real_path(str(folder)) for folder in self.folders or cache]
        real = _real_path(path)
        if not any(os.path.commonpath([real, folder]) == folder for folder in folders):
            raise BadSample(f"path outside: {path} does not lie in the folder of the source (see allow_outside)")
        return path

    def sample(self, row: dict[str, Any], stage: str, name: str, which: int = 0) -> RawSample:
        """What a collator needs of a row: `image` in stage `vision` (the one numbered `which`), else `messages`."""
        raw: RawSample = {"name": name, "source": self.source.path}
        if self.source.fetch:
            raw["fetch"] = self.source.private_hosts
        if self.source.projection:
            raw["projection"] = self.source.projection
        try:
            if row.get(ERROR):
                raise BadSample(f"broken row: {row[ERROR]}")
            images = self.panoramas(row)
            if not images:
                raise BadSample(f"missing image: none in the column {self.columns['image']!r}")
            raw |= self._labels(row)
            if stage == "vision":
                return {**raw, "image": images[which]}
            said = [messages_of(turns, images) for turns in self._turns(row)]
            raw |= {"messages": said[0], "further": self._further(row)}
            if len(said) > 1:
                raw["answers"] = [messages[-1] for messages in said]
            return {**raw, "known": known} if (known := knowledge_of(row)) is not None else raw
        except BROKEN_ROW as error:
            words = f"broken row: {type(error).__name__}: {error}"
            return {**raw, "error": str(error) if isinstance(error, BadSample) else words[:300]}

    def _further(self, row: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Further conversations about the panorama."""
        found = row.get(self.columns["tables"]) if "tables" in self.columns else None
        found = json.loads(found) if isinstance(found, str) else found or []
        if not isinstance(found, list) or not all(isinstance(turns, list) for turns in found):
            raise BadSample(f"broken row: {self.columns['tables']!r} must be a list of conversations")
        return [messages_of(turns, []) for turns in found if turns]

    def _turns(self, row: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The conversation; where the answer is a list of texts, one with each."""
        if "conversation" not in self.columns:
            asked = {"role": "user", "content": row.get(self.columns["question"])}
            answers = references_of(self._listed(row, self.columns["answer"]))
            return [[asked, {"role": "assistant", "content": answer}] for answer in answers]
        turns = row.get(self.columns["conversation"])
        turns = json.loads(turns) if isinstance(turns, str) else turns
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadSample(f"broken row: {self.columns['conversation']!r} must be a list of turns")
        return [turns]

    def _listed(self, row: dict[str, Any], column: str) -> Any:
        """A value as it was before a text file became a table of strings: lists are lists again."""
        value = row.get(column)
        return json.loads(value) if value and column in json.loads(row.get(LISTS) or "[]") else value


def read_source(source: DataSource) -> tuple[Dataset | IterableDataset, str | None]:
    """The rows of a source, and the folder that its relative image paths start from."""
    path = Path(existing(source.path))
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
            if any(name.endswith(".parquet") for name in list_folder(path)[0]):
                patterns = get_data_patterns(str(path))  # splits by the names of files and folders, as on the Hub
                files = DataFilesDict.from_patterns(patterns, base_path=str(path), allowed_extensions=[".parquet"])
                by_split = {split: list(names) for split, names in files.items() if names}
                data = load_dataset("parquet", data_files=by_split, split=source.split, streaming=source.streaming)
                return data, str(folder)
            names, left_out = panoramas_in(folder)
            if not names:
                held = f"; it holds {said_of(left_out)}" if left_out else ""
                raise ValueError(
                    f"the folder has no metadata.jsonl, metadata.csv, images, parquet or saved dataset{held}"
                )
            if left_out:
                _say_once(f"{source.path}: {len(names)} panoramas; left out are {said_of(left_out)}")
            rows = Dataset.from_dict({"image": names})
            return (rows.to_iterable_dataset() if source.streaming else rows), str(folder)
        path = metadata[0]
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            data = load_dataset("parquet", data_files=str(path), split="train", streaming=source.streaming)
            return data, str(path.parent)
        if path.suffix.lower() not in (".csv", ".tsv", ".json", ".jsonl"):
            raise ValueError("a file must end in .csv, .tsv, .json, .jsonl or .parquet")
        if source.streaming:
            return IterableDataset.from_generator(text_rows, gen_kwargs={"path": str(path)}), str(path.parent)
        return text_table(path), str(path.parent)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.path):
        raise ValueError("there is no such file or folder, and it is no name of a Hub dataset (org/name)")
    try:
        return load_dataset(source.path, source.subset, split=source.split, streaming=source.streaming), None
    except (OSError, DatasetsError) as error:
        raise ValueError(
            f"there is no such file or folder, and the Hub does not give such a dataset: {error}"
        ) from error


def what_it_is(source: DataSource) -> str:
    """What `read_source` takes a source for, in words."""
    path = Path(existing(source.path))
    stream = ", streamed" if source.streaming else ""
    if source.path.startswith(SYNTHETIC):
        return f"scenes that are rendered{stream}: {source.path}"
    if path.is_file():
        return f"file {path}{stream}"
    if not path.is_dir():
        return f"dataset {source.path} of the Hub, split {source.split}{stream}"
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return f"saved dataset {path}{stream}"
    folder = path / source.split if (path / source.split).is_dir() else path
    if any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv")):
        return f"folder with metadata {folder}{stream}"
    parquet = any(name.endswith(".parquet") for name in list_folder(path)[0])
    return (
        f"folder of parquet {path}, split {source.split}{stream}" if parquet else f"folder of images {folder}{stream}"
    )


def open_source(source: DataSource, stage: str) -> OpenedSource:
    """A source with its columns; what is wrong with it as a whole is a `ValueError` that names it."""
    if not source.weight > 0:
        raise ValueError(f"the weight of {source.path!r} must be positive, got {source.weight}. Typical value: 1.0")
    try:
        Projection.parse(source.projection)
    except ValueError as error:
        raise ValueError(f"of {source.path!r}: {error}") from None
    if source.path.startswith(SYNTHETIC):
        return SyntheticSource.open(source)
    if source.images is not None:
        source = replace(source, images=existing(source.images))
    try:
        data, root = read_source(source)
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
        named = [name for name in there if name not in (ERROR, LISTS)]
        reason = _first_error(data if isinstance(data, Dataset) else first) if ERROR in there else None
        if not named:
            raise ValueError(
                f"{source.path!r}: none of its rows can be read: {reason}. A .jsonl file holds an object a line, a "
                ".json file the same or a list of objects"
            )
        broken = f". Rows that cannot be read are left out: {reason}" if reason else ""
        names = "; ".join(f"{what} ({' or '.join(known)})" for what, known in _KNOWN.items())
        raise ValueError(
            f"{source.path!r} has the columns {named} and lacks {missing}. "
            f"Known names: {names}. A conversation stands for question and answer; "
            f"image_column, question_column, answer_column and conversation_column name others{broken}"
        )
    if text and "tables" in columns:
        text = (*text, "tables")
    used = {what: columns[what] for what in ("image", *text)}
    labels = [column.column for column in source.labels.values()] + [source.things_column] * bool(source.things_column)
    if source.things_column and not source.labels:
        raise ValueError(f"{source.path!r} has a things_column and no labels: name what the things are, too")
    if missing := [name for name in labels if name not in there]:
        raise ValueError(f"{source.path!r} has no columns {missing} of token labels, its columns are {there}")
    if data.column_names is not None:
        wanted = dict.fromkeys((*used.values(), *labels, ERROR, LISTS, *(KNOWLEDGE if text else ())))
        data = data.select_columns([name for name in wanted if name in there])
    kind = (data.features or {}).get(used["image"])
    if isinstance(kind, Image):
        data = data.cast_column(used["image"], Image(decode=False))
    elif isinstance(getattr(kind, "feature", None), Image):
        data = data.cast_column(used["image"], List(Image(decode=False)))
    for name in labels:
        if isinstance((data.features or {}).get(name), Image):
            data = data.cast_column(name, Image(decode=False))
    folders = tuple(folder for folder in (source.images, root) if folder)
    known = tuple(name for name in RULES if name in there)
    opened = OpenedSource(source, data, used, source.images or root, folders, known)
    if isinstance(data, Dataset):
        files = [image for row in data.take(min(100, len(data))) for image in try_panoramas(opened, row)]
        paths = [file for file in files if isinstance(file, str) and "://" not in file]
        if paths and len(paths) == len(files) and not any(map(os.path.isfile, paths)):
            raise ValueError(
                f"none of the first {len(paths)} images of {source.path!r} exists, such as {paths[0]!r}; "
                "`images` must name the folder they lie in"
            )
    return opened


class SyntheticSource(OpenedSource):
    """Scenes that are rendered when they are asked for: row n is scene n of a :class:`World`."""

    world: World

    @classmethod
    def open(cls, source: DataSource) -> SyntheticSource:
        """The scenes that `synthetic://?scenes=N&seed=S&...` names.

        Raises:
            ValueError: for an option that there is not, or a value that it cannot have.
        """
        scenes, world = parse_world(source.path)
        warn_without_cutouts()
        rows = Dataset.from_dict({"image": range(scenes)})
        data = rows.to_iterable_dataset(num_shards=min(scenes, 64)) if source.streaming else rows
        opened = cls(source, data, {"image": "image"}, None, known=tuple(RULES))
        opened.world = world
        return opened

    @property
    def label_fields(self) -> dict[str, int]:
        """As in :class:`OpenedSource`: what a scene knows of each direction."""
        return self.world.label_fields

    def panoramas(self, row: dict[str, Any]) -> list[str | bytes]:
        """The name of the scene: it is rendered only for a sample."""
        return [f"{self.source.path}#{row['image']}"]

    def sample(self, row: dict[str, Any], stage: str, name: str, which: int = 0) -> RawSample:
        """The scene with a conversation about it."""
        raw: RawSample = {"name": f"scene {row['image']}", "source": self.source.path}
        scene = self.world.scene(row["image"])
        picture, maps = self.world.labelled_picture(scene)
        raw["labels"] = maps
        if stage == "vision":
            return {**raw, "image": picture}
        said = self.world.row(scene)
        further = [messages_of(turns, []) for turns in said.get("tables", [])]
        messages = messages_of(said["conversations"], [picture])
        return {**raw, "messages": messages, "further": further, "known": knowledge_of(said)}


def _names_in(value: str) -> str | list[str]:
    """The names of images in a JSON list; any other text is one name, such as `[360] park.jpg`."""
    try:
        names = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else value


def _first_error(rows: Iterable[dict[str, Any]]) -> str | None:
    """Why the first row that cannot be read cannot be."""
    return next((row[ERROR] for row in rows if row.get(ERROR)), None)


def try_panoramas(opened: OpenedSource, row: dict[str, Any]) -> list[str | bytes]:
    """The images of a row; none where it is broken, which its collator reports."""
    try:
        return opened.panoramas(row)
    except BROKEN_ROW:
        return []


@cache
def _say_once(words: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes one says it
        logger.warning("%s", words)


_real_path = lru_cache(maxsize=100_000)(os.path.realpath)


def identity(image: str | bytes) -> str:
    """What tells panoramas apart: the file, or its content where the dataset holds it."""
    if isinstance(image, bytes):
        return digest(image)
    return image if "://" in image else _real_path(image)


def digest(value: str | bytes) -> str:
    """Sixteen hexadecimal digits that differ where values do."""
    data = value if isinstance(value, bytes) else value.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=8).hexdigest()
