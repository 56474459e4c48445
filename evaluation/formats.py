"""Reading questions: a file or folder as it was released becomes items, and what is none is listed with its reason."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Image, List
from datasets.exceptions import DatasetsError

from ..data.files import existing, is_hidden, is_panorama
from ..data.rows import BadSample, table_rows
from ..data.sources import BROKEN_ROW, DataSource, read_source
from .fields import Dropped, Files, shown
from .items import Item, ReadItems
from .released import FORMATS, Row, format_of, rotate_options

__all__ = ["read_items", "rotate_options", "write_predictions"]

_TEXT = (".jsonl", ".json", ".csv", ".tsv")
_LOOKED_AT = 100  # rows by which a format is known
_LISTS = ("data", "items", "questions", "annotations", "samples")  # where a JSON object holds its rows


@dataclass
class _Opened:
    rows: Iterator[Row]
    folder: str | None  # of the data; of a dataset on the Hub there is none
    format: str | None = None  # where the shape of the folder says it


def read_items(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    images: str | os.PathLike[str] | None = None,
    format: str | None = None,
    limit: int | None = None,
) -> ReadItems:
    """The questions of a data set of panoramas, as it was released.

    Args:
        path: a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, a folder (with `metadata.jsonl` or
            `metadata.csv`, of OSR-Bench's or H*Bench's scenes, of parquet, a saved dataset), or a dataset on the Hub.
        split: of a saved or a Hub dataset; a folder's subfolder of the split's name wins over the folder.
        images: folder that images' names start from before the data's own; a row may name files in these two alone.
        format: one of `FORMATS`; found by the fields without it.
        limit: the first so many questions; what lies behind them is not read, so not listed as dropped either.

    Returns:
        The questions, and each row that is none: `row` (the line of a text file, the row of a table or the turn of a
        conversation, from 1), `reason`, and `file` where there are several. The second question of an id is dropped
        as a duplicate.

    Raises:
        ValueError: for what cannot be read as a whole, an unknown format, or fields that fit none.
    """
    path, images = os.fspath(path), None if images is None else existing(os.fspath(images))
    if format is not None and format not in FORMATS:
        raise ValueError(f"there is no format {format!r}, only {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    try:
        opened = _open(path, split)
        first = list(islice(opened.rows, _LOOKED_AT))
    except (ValueError, OSError, RecursionError, MemoryError, csv.Error, DatasetsError) as error:
        raise ValueError(f"cannot read {path!r}: {str(error)[:300]}") from error
    if not first:
        raise ValueError(f"{path!r} has no rows; at least one question is needed")
    names = list(dict.fromkeys(name for row in first for name in row.fields))
    found = format or opened.format or format_of(first)
    if found is None:
        broken = next((f" The first rows cannot be read: {row.reason}." for row in first if row.reason), "")
        fields = ", ".join(map(shown, names[:30])) + (f", … ({len(names)} in all)" if len(names) > 30 else "")
        raise ValueError(
            f"{path!r} has the fields {fields or '(none)'}, which fit none of the formats {', '.join(FORMATS)}."
            f"{broken} `format` names one"
        )
    inside = [folder for folder in (images, opened.folder) if folder]
    files = Files(inside or [str(datasets.config.HF_DATASETS_CACHE), str(datasets.config.HF_CACHE_HOME)])
    return _read(chain(first, opened.rows), files, found, limit)


def _read(rows: Iterator[Row], files: Files, format: str, limit: int | None) -> ReadItems:
    """The items of rows in a format that is known."""
    adapter, finish, same = FORMATS[format].adapter, FORMATS[format].finish, FORMATS[format].same
    read = ReadItems([], [], format)
    seen: dict[Any, Item] = {}

    def drop(row: Row, reason: str) -> None:
        where = {"file": row.file} if row.file else {}
        words = reason.encode(errors="replace").decode()[:300]
        read.dropped.append({"row": row.number, "reason": words, **where})

    for row in rows:
        try:
            if row.reason is not None:
                raise Dropped(f"broken row: {row.reason}")
            for item in adapter(row, files):
                if isinstance(item, Dropped):
                    drop(row, str(item))
                elif (first := seen.setdefault(same(item), item)) is not item:
                    drop(row, f"duplicate of {shown(first.id)}")
                else:
                    read.items.append(item)
        except (*BROKEN_ROW, OverflowError, MemoryError, OSError) as error:
            drop(row, str(error) if isinstance(error, BadSample) else f"broken row: {type(error).__name__}: {error}")
        if limit is not None and finish is None and len(read.items) >= limit:
            break
    if finish is not None:
        read.items = finish(read.items)
    read.items = read.items[:limit]
    return read


def write_predictions(path: str | os.PathLike[str], answers: Mapping[str, str]) -> None:
    """Answers as PanoSpace-Bench takes them: a line of JSON each, `item_id` and `prediction`.

    Args:
        path: of the file, which is written anew.
        answers: by the ids of the items.
    """
    lines = [json.dumps({"item_id": id, "prediction": answer}) + "\n" for id, answer in answers.items()]
    Path(path).write_text("".join(lines), encoding="utf-8")


# What holds the rows


def _open(path: str, split: str) -> _Opened:
    if "\0" in path:
        raise ValueError("there is no such file or folder")
    place = Path(existing(path))
    if place.is_dir() and not any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        folder = place / split if (place / split).is_dir() else place
        for name in ("metadata.jsonl", "metadata.csv"):
            if (folder / name).is_file():
                return _Opened(_text_rows(folder / name), str(folder))
        if scenes := sorted(_walk(folder, ".json")):
            return _scenes(scenes, folder)
    if place.is_file() and place.suffix.lower() in _TEXT:
        return _Opened(_text_rows(place), str(place.parent))
    data, root = read_source(DataSource(str(place) if place.exists() else path, split=split))
    for name, kind in (data.features or {}).items():
        if isinstance(kind, Image):
            data = data.cast_column(name, Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), Image):
            data = data.cast_column(name, List(Image(decode=False)))
    return _Opened((Row(number, fields) for number, fields in enumerate(data, 1)), root)


def _text_rows(path: Path, file: str | None = None) -> Iterator[Row]:
    """The rows of a text file, their values as JSON has them (a table's are text)."""
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return (Row(number, fields, reason) for number, (fields, reason) in enumerate(table_rows(path), 1))
    if ending == ".jsonl":
        return _lines(path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as opened:
        content = json.load(opened)
    return _objects(content, path, file)


def _lines(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _row(number, json.loads(line))
            except (ValueError, RecursionError, MemoryError) as error:
                yield Row(number, {}, f"not JSON: {error}")


def _row(number: int, fields: Any, file: str | None = None) -> Row:
    if not isinstance(fields, dict):
        return Row(number, {}, f"it must be an object, got {shown(fields)}", file)
    return Row(number, fields, None, file)


def _objects(content: Any, path: Path, file: str | None) -> Iterator[Row]:
    """The rows of what a .json file holds: a list, an object that has one, or conversations of OSR-Bench."""
    if isinstance(content, dict) and "conversation" not in content:
        content = next((content[name] for name in _LISTS if isinstance(content.get(name), list)), [content])
    if isinstance(content, dict):
        yield from _turns(content, str(path.parent / "rgb.png"), 0, file)
        return
    if not isinstance(content, list):
        raise ValueError(f"it must hold a list or an object, got {shown(content)}")
    turns = 0
    for number, each in enumerate(content, 1):
        if isinstance(each, dict) and "conversation" in each:
            for row in _turns(each, each.get("image_id"), turns, file):
                turns = row.number
                yield row
        else:
            yield _row(number, each, file)


def _turns(scene: dict[str, Any], image: Any, before: int, file: str | None) -> Iterator[Row]:
    """The questions of one conversation of OSR-Bench."""
    turns = scene["conversation"]
    if not isinstance(turns, list) or not turns:
        yield Row(before + 1, {}, f"conversation must be a list of turns, got {shown(turns)}", file)
        return
    for number, turn in enumerate(turns, before + 1):
        row = _row(number, turn, file)
        row.fields = {**row.fields, "image": image} if row.reason is None else {}
        yield row


# Folders of scenes


def _walk(folder: Path, *endings: str) -> Iterator[Path]:
    """The files below a folder that end so; links to folders are not followed."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found = (name for name in sorted(names) if name.lower().endswith(endings) and not is_hidden(name))
        yield from (Path(parent) / name for name in found)


def _scenes(found: list[Path], folder: Path) -> _Opened:
    """The rows of OSR-Bench (a conversation beside `rgb.png`) or H*Bench (`annotation.json` beside one image)."""
    annotations = [path for path in found if path.name == "annotation.json"]
    if annotations:
        return _Opened(chain.from_iterable(_annotation(path, folder) for path in annotations), str(folder), "hbench")
    rows = chain.from_iterable(_conversation(path, folder) for path in found)
    first = next(rows, None)
    if first is None:
        raise ValueError("its .json files hold no conversation, and no annotation.json is there")
    return _Opened(chain([first], rows), str(folder), "osr")


def _conversation(path: Path, folder: Path) -> Iterator[Row]:
    """The rows of a file that holds a conversation; none of other files, which are no questions."""
    file = str(path.relative_to(folder))
    content = _json(path)
    if isinstance(content, Row):
        yield Row(0, {}, content.reason, file)
        return
    objects: Iterable[Any] = content if isinstance(content, list) else [content]
    if any(isinstance(each, dict) and "conversation" in each for each in objects):
        yield from _objects(content, path, file)


def _annotation(path: Path, folder: Path) -> Iterator[Row]:
    file = str(path.relative_to(folder))
    content = _json(path)
    if isinstance(content, Row):
        yield Row(0, {}, content.reason, file)
        return
    beside = sorted(each for each in path.parent.iterdir() if is_panorama(each.name) and not is_hidden(each.name))
    for row in _objects(content if isinstance(content, list) else [content], path, file):
        row.fields = {"image": str(beside[0]) if beside else None, **row.fields}
        yield row


def _json(path: Path) -> Any:
    """What a file of a folder holds; a `Row` with the reason where it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return json.load(file)
    except (ValueError, RecursionError, MemoryError, OSError) as error:
        return Row(0, {}, f"not JSON: {error}")
