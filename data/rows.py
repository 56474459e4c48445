"""Rows: what a line of a text file or a row of a table says, as messages about its images."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError

from ..processing_panorama import IMAGE_TOKEN
from .files import is_panorama

logger = logging.getLogger(__name__)

RawSample = dict[str, Any]
_LARGE = 50_000_000  # bytes; what takes more than a few seconds is announced
_LONGEST_FIELD = 1 << 30  # characters; a table may hold images in base64
_FORMAT = 2  # of the tables that are kept: to be raised when `text_rows` gives something else of the same file
ERROR = "__error__"  # a column with what is wrong with a row of a text file
LISTS = "__lists__"  # a column with the names of those of a text file that hold a list, as JSON
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


def check_said(messages: list[dict[str, Any]]) -> None:
    """Raise :class:`BadSample` where a turn says nothing, or nobody answers."""
    for number, message in enumerate(messages, 1):
        if message["role"] != "system" and not any((part.get("text") or "").strip() for part in message["content"]):
            kind = "question" if message["role"] == "user" else "answer"
            raise BadSample(f"empty {kind}: in turn {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadSample("no answer: there is no turn of the assistant to learn from")


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
    """Rows of a .csv, .tsv, .json (a list) or .jsonl file. Values are strings, lists and objects as JSON; which columns
    of a row hold a list of plain values, and not a string that looks like one, says the column `LISTS`. A row that
    cannot be read has its reason in the column `ERROR`.

    Args:
        path: of the file.
        state: what tells its contents from earlier ones, for whoever keeps what was read.
    """
    for fields, reason in (table_rows if path.lower().endswith((".csv", ".tsv")) else _json_rows)(path):
        try:
            if reason is not None:
                raise ValueError(reason)
            if not isinstance(fields, dict):
                raise ValueError(f"it must be a JSON object, got {str(fields)[:80]!r}")
            lists = [name for name, value in fields.items() if _is_plain_list(value)]
            row = {name: _as_text(value) for name, value in fields.items()}
            yield {**row, LISTS: json.dumps(lists)} if lists else row
        except (ValueError, RecursionError) as error:
            yield {ERROR: _printable(str(error))}


def _json_rows(path: str) -> Iterator[tuple[Any, str | None]]:
    """The values of a file of JSON, or why one cannot be read."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        if path.lower().endswith(".json") and file.read(1000).lstrip().startswith("["):
            file.seek(0)
            yield from ((value, None) for value in json.load(file))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line), None
                except json.JSONDecodeError as error:
                    where = f"at {error.colno} of {line.strip()[:60]!r}"
                    yield None, f"line {number} is not JSON: {error.msg} {where}"
                except (ValueError, RecursionError) as error:
                    yield None, f"line {number} is not JSON: {error}"


class _Lines:
    """The lines of a file, which can be given back."""

    def __init__(self, file: Iterable[str]):
        self.file, self.waiting = iter(file), deque[str]()
        self.taken: list[str] = []  # since `begin`
        self.number = 1  # of the first of them

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.waiting.popleft() if self.waiting else next(self.file)
        self.taken.append(line)
        return line

    def begin(self) -> None:
        self.number += len(self.taken)
        self.taken = []

    def give_back(self) -> None:
        """All but the first since `begin`."""
        self.waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def table_rows(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The rows of a .csv or .tsv file (also with semicolons), or why one cannot be read; blank lines are none.

    A quote that is not closed where it should be would swallow the rows after it: only the row that it begins in is
    broken, and reading goes on in the next line.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header = file.readline()
        file.seek(0)
        found = (mark for mark in ",\t;" if mark in header)
        delimiter = "\t" if os.fspath(path).lower().endswith(".tsv") else next(found, ",")
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(reader, [])
        while True:
            lines.begin()
            try:
                values = next(reader, None)
                if values is None:
                    return
                if len(lines.taken) > 1:
                    _check_nothing_swallowed(values, delimiter)
            except csv.Error as error:
                last = lines.number + len(lines.taken) - 1
                where = f"line {last}" if last == lines.number else f"lines {lines.number} to {last}"
                yield {}, f"{where}: {error}; a quote is open, or one inside of quotes is not doubled"
                lines.give_back()
                continue
            if len(values) > len(names):
                yield {}, f"line {lines.number}: it has more fields than the header: {values[len(names) :]}"
            elif values:
                yield dict(zip_longest(names, values)), None


def _check_nothing_swallowed(values: list[str], delimiter: str) -> None:
    """Raise `csv.Error` where a value of several lines holds what looks like a row: as many fields, and a picture's
    name where the row has one."""
    named = [place for place, value in enumerate(values) if is_panorama(value.split("?")[0])]
    for line in (line for value in values for line in value.splitlines()[1:]):
        fields = line.split(delimiter)
        if len(fields) == len(values) and any(is_panorama(fields[place].split("?")[0]) for place in named):
            raise csv.Error(f"a value holds another row, {_printable(line[:60])!r}")


def references_of(value: Any) -> list[Any]:
    """The answers that are right, of which a list of texts holds several; a list of numbers, a place, is one.

    Raises:
        BadSample: for a list that holds something else, or nothing.
    """
    if not isinstance(value, list):
        return [value]
    if value and all(isinstance(each, str) and each.strip() for each in value):
        return value
    if value and all(isinstance(each, int | float) for each in value):
        return [json.dumps(value)]
    raise BadSample(f"broken row: a list of answers must hold texts, got {str(value)[:80]}")


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(each, dict | list) for each in value)


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
