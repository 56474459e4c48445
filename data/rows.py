"""Rows: what a line of a text file or a row of a table says, as messages about its images."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError

from ..processing_panorama import IMAGE_TOKEN

logger = logging.getLogger(__name__)

RawSample = dict[str, Any]
_LARGE = 50_000_000  # bytes; what takes more than a few seconds is announced
_FORMAT = 1  # of the tables that are kept: to be raised when `text_rows` gives something else of the same file
ERROR = "__error__"  # a column with what is wrong with a row of a text file
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSample(ValueError):
    """Why one sample cannot be used, as `kind: details`."""


def messages_of(turns: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
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
        for part, strip in ((parts[:1], str.lstrip), (parts[-1:], str.rstrip)):  # an answer begins with its first word
            if part and part[0]["type"] == "text":
                part[0]["text"] = strip(part[0]["text"])
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


def text_rows(path: str, state: Any = None) -> Iterator[dict[str, str | None]]:
    """Rows of a .csv, .json (a list) or .jsonl file. Values are strings, lists and objects as JSON; a row that cannot
    be read has its reason in the column `ERROR`.

    Args:
        path: of the file.
        state: what tells its contents from earlier ones, for whoever keeps what was read.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        is_list = path.endswith(".json") and file.read(1000).lstrip().startswith("[")
        file.seek(0)
        rows: Iterable[Any] = csv.DictReader(file) if path.endswith(".csv") else filter(str.strip, file)
        for row in json.load(file) if is_list else rows:
            try:
                fields = json.loads(row) if isinstance(row, str) and not is_list else row
                if not isinstance(fields, dict):
                    raise ValueError(f"it must be a JSON object, got {str(row)[:80]!r}")
                if None in fields:
                    raise ValueError(f"it has more fields than the header: {fields[None]}")
                yield {name: _as_text(value) for name, value in fields.items()}
            except (ValueError, RecursionError) as error:
                yield {ERROR: _printable(str(error))}


def _as_text(value: Any) -> str | None:
    text = value if value is None or isinstance(value, str) else json.dumps(value)
    if text is not None and _printable(text) != text:
        raise ValueError(f"it is not UTF-8 text: {_printable(text)[:80]!r}")
    return text


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def text_table(path: Path) -> Dataset:
    """The rows of a text file as `text_rows` gives them, in a table on disk that is read where it is needed: memory
    does not grow with the rows. It is written once, by the first process that asks, into the cache of `datasets`, and
    again when the file has changed.

    Raises:
        ValueError: for a file that cannot be read as a whole, or a cache that cannot be written.
    """
    found = path.stat()
    if not any(text_rows(str(path))):
        return Dataset.from_dict({})
    if found.st_size > _LARGE:
        logger.info("%s (%d MB) is read into a table on disk, once.", path, found.st_size // 10**6)
    return _kept(text_rows, path, found, list(_kept(_columns, path, found, ["name"])["name"]))


def _columns(path: str, state: Any) -> Iterator[dict[str, str]]:
    """The columns that any row of a text file has."""
    yield from ({"name": name} for name in dict.fromkeys(column for row in text_rows(path) for column in row))


def _kept(generator: Any, path: Path, found: os.stat_result, columns: list[str]) -> Dataset:
    features = Features({column: Value("string") for column in columns})
    arguments = {"path": str(path.resolve()), "state": (_FORMAT, found.st_size, found.st_mtime_ns)}
    try:
        return Dataset.from_generator(generator, features=features, gen_kwargs=arguments)
    except DatasetsError as error:
        raise ValueError(str(error.__cause__ or error)) from error
