"""Fields: what a value of a row means, checked: text, numbers, places, options, files.

Rows come from outside. Each function gives what it promises or raises `Dropped` with the reason.
"""

from __future__ import annotations

import ast
import binascii
import json
import math
import os
import re
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..data.files import spellings
from ..data.rows import BadSample, references_of
from ..data.sources import digest
from ..places_panorama import BFoV, check_bfov, read_places
from ..processing_panorama import IMAGE_TOKEN
from ..reading_panorama import open_image

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LONGEST = 100_000  # characters of a field that is read as a list
_NUMBERS = re.compile(r"[\[(]?\s*[-+]?[\d.]+(?:\s*,\s*[-+]?[\d.]+){3}\s*[\])]?")


class Dropped(BadSample):
    """Why a row is no question."""


def clean(value: str, name: str) -> str:
    """Text that can be written, shown and tokenised."""
    if "\0" in value:
        raise Dropped(f"{name} holds a NUL")
    if value.encode(errors="replace").decode() != value:
        raise Dropped(f"{name} is not UTF-8 text: {value.encode(errors='replace').decode()[:60]!r}")
    return value


def text(row: dict[str, Any], *names: str) -> str | None:
    """The first of the fields that is not empty, numbers as they are written; `None` where there is none."""
    for name in names:
        value = row.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float) and not math.isfinite(value):
            raise Dropped(f"{name} is {value}")
        if not isinstance(value, str | int | float):
            raise Dropped(f"{name} must be text, got {type(value).__name__}")
        if words := clean(str(value), name).strip():
            return words
    return None


def texts(row: dict[str, Any], *names: str) -> list[str]:
    """As `text`, of a field that may be a list of several."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list | tuple):
            return [needed({name: each}, name) for each in references_of(list(value))]
        if (found := text(row, name)) is not None:
            return [found]
    return []


def needed(row: dict[str, Any], *names: str) -> str:
    """As `text`, of a row that must have it."""
    found = text(row, *names)
    if found is None:
        raise Dropped(f"no {names[0]}" if len(names) == 1 else f"no {names[0]} ({', '.join(names)})")
    return found


def question(row: dict[str, Any], *names: str) -> str:
    """The words of a question: without the place of the image, which is not the question's to say."""
    words = needed(row, *(names or ("question", "query", "prompt", "instruction"))).replace(IMAGE_TOKEN, "").strip()
    if not words:
        raise Dropped("no question")
    return words


def label(row: dict[str, Any], *names: str) -> str:
    """A kind or group: text or a list of texts, empty where there is none."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list | tuple):
            return ", ".join(needed({name: each}, name) for each in value)
        if (found := text(row, name)) is not None:
            return found
    return ""


def number(value: Any, name: str) -> float:
    """A finite number, also one in a string."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Dropped(f"{name} must be a number, got {shown(value)}") from None
    if not math.isfinite(found):
        raise Dropped(f"{name} is {found}")
    return found


def shown(value: Any) -> str:
    """The beginning of a value, for a reason; never itself a reason to stop."""
    try:
        return repr(value)[:60].encode(errors="replace").decode()
    except (ValueError, RecursionError):
        return type(value).__name__


def unpacked(value: Any) -> Any:
    """Lists and objects that a table holds as text, as JSON or as Python writes them; other values as they are."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{") or len(value) > _LONGEST:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value


def plain(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """The fields that a row has, for `Item.more`: what JSON can write."""
    found = {name: row[name] for name in names if row.get(name) not in (None, "")}
    for name, value in found.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise Dropped(f"{name} cannot be kept: {shown(error)}") from None
    return found


# Places


def place(value: Any, name: str = "place") -> BFoV:
    """Four numbers, an object that names them, or a string of either."""
    value = unpacked(value)
    if isinstance(value, str) and "fov" in value.lower() and len(value) < 1000:
        if len(found := read_places(value)) == 1:
            return found[0].place
    if isinstance(value, str) and _NUMBERS.fullmatch(value[:1000].strip()):
        value = value.strip(" \n[]()").split(",")
    if isinstance(value, dict):
        value = [value.get(part) for part in BFoV._fields]
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise Dropped(f"{name} must be [yaw, pitch, x_fov, y_fov], got {shown(value)}")
    return bfov([number(each, name) for each in value], name)


def bfov(values: Sequence[float], name: str = "place") -> BFoV:
    """Numbers as a place on the sphere."""
    try:
        return check_bfov(values)
    except ValueError as error:
        raise Dropped(f"{name}: {error}") from None


def places(value: Any, name: str = "places") -> list[BFoV]:
    """One place or a list of them; an empty list says that there is none."""
    value = unpacked(value)
    if isinstance(value, list | tuple) and (not value or all(isinstance(each, list | tuple | dict) for each in value)):
        return [place(each, name) for each in value]
    return [place(value, name)]


def looks_like_places(value: Any) -> bool:
    """Whether an answer is made of places, right or wrong ones, and not of words."""
    value = unpacked(value)
    if isinstance(value, str):
        value = value[:1000].strip()
        return bool(_NUMBERS.fullmatch(value)) or ("x_fov" in value.lower() and len(read_places(value)) == 1)
    if isinstance(value, dict):
        return "yaw" in value
    if not isinstance(value, list) or not value:
        return False
    numbers = all(isinstance(each, int | float) for each in value) and len(value) == 4
    return numbers or all(isinstance(each, list | dict) for each in value)


def bbox_place(box: Any, size: tuple[int, int], name: str = "bbox_2d") -> BFoV:
    """A box in pixels of an equirectangular image as a place.

    Args:
        box: [x1, y1, x2, y2], edges; across the seam where x1 > x2.
        size: width and height of the image.
        name: of the field, for the reason.
    """
    box = unpacked(box)
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise Dropped(f"{name} must be [x1, y1, x2, y2], got {shown(box)}")
    x1, y1, x2, y2 = (number(each, name) for each in box)
    width, height = size
    if not (0 <= x1 <= width and 0 <= x2 <= width and 0 <= y1 < y2 <= height):
        raise Dropped(f"{name} {shown(box)} is no box in an image of {width} x {height}")
    across = x2 - x1 if x2 >= x1 else x2 - x1 + width
    yaw = ((x1 + across / 2) / width - 0.5) * 360
    pitch = (0.5 - (y1 + y2) / 2 / height) * 180
    return bfov([yaw, pitch, across / width * 360, (y2 - y1) / height * 180], name)


def interval(value: Any, name: str) -> tuple[float, float]:
    """[low, high] in degrees."""
    value = unpacked(value)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Dropped(f"{name} must be [low, high] in degrees, got {shown(value)}")
    return number(value[0], name), number(value[1], name)


# Options


def options(value: Any) -> list[tuple[str, str]]:
    """The options of a multiple choice.

    Args:
        value: a list of {"key", "text"}, of [key, text] or of texts (`A. text` or the letters in their order), or an
            object of texts by key.

    Returns:
        Key and text of each; none for a value that is empty.
    """
    value = unpacked(value)
    if value is None or value == "" or value == [] or value == {}:
        return []
    if isinstance(value, dict):
        value = [list(pair) for pair in value.items()]
    if not isinstance(value, list | tuple) or len(value) > len(_LETTERS):
        raise Dropped(f"options must be a list, got {shown(value)}")
    found = []
    for letter, each in zip(_LETTERS, value, strict=False):
        if isinstance(each, dict):
            pair = (needed(each, "key", "label"), needed(each, "text", "value"))
        elif isinstance(each, list | tuple) and len(each) == 2:
            pair = (needed({"key": each[0]}, "key"), needed({"text": each[1]}, "text"))
        else:
            words = needed({"option": each}, "option")
            pair = (letter, re.sub(rf"^\(?{letter}[.):]\s+", "", words))
        found.append(pair)
    keys = [key for key, _ in found]
    if len(set(keys)) != len(keys):
        raise Dropped(f"options have a key twice: {shown(keys)}")
    return found


def right_key(answer: str, among: list[tuple[str, str]]) -> str:
    """Which option an answer names: its key (`B`, `(b)`, `B.`) or its text."""
    short = answer.strip(" ().:").casefold()
    exact = [key for key, _ in among if key == answer]
    by_key = exact or [key for key, _ in among if key.casefold() == short]
    by_text = [key for key, words in among if words.casefold() == answer.casefold()]
    by_both = [key for key, words in among if answer.casefold() == f"{key}. {words}".casefold()]
    for found in (by_key, by_text, by_both):
        if len(found) == 1:
            return found[0]
    raise Dropped(f"the answer {shown(answer)} is none of the options {shown([key for key, _ in among])}")


# Files


@dataclass
class Files:
    """The images that rows may name: files under the data's folder or `images`, links resolved.

    Attributes:
        folders: that names start from, the first one wins; of a snapshot in the Hub's cache, its files as well.
        shared: images by the index of the row that holds them, for rows that name another row.
    """

    folders: list[str]
    shared: dict[str, str | bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folders = [os.path.realpath(folder) for folder in self.folders]
        caches = [re.match(r"(.*/(?:datasets|models)--[^/]+)/snapshots/", folder + "/") for folder in self.folders]
        self.behind = [f"{found[1]}/blobs" for found in caches if found]  # where the Hub's cache links to

    def find(self, value: Any) -> str | bytes:
        """The image that a field names (a path, or a list of one) or holds (the bytes of a file)."""
        value = unpacked(value)
        if isinstance(value, list):
            if len(value) != 1:
                raise Dropped(f"a question must have one image, got {len(value)}")
            value = value[0]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if value is None or value == "" or value == b"":
            raise Dropped("no image")
        if not isinstance(value, str):
            raise Dropped(f"the image must be a path, got {type(value).__name__}")
        return self._file(clean(value, "the image's path"))

    def _file(self, name: str) -> str:
        if "://" in name:
            raise Dropped(f"the image is an address, not a file: {shown(name)}")
        outside = False
        for folder, form in product(self.folders, spellings(name)):
            path = os.path.normpath(os.path.join(folder, form))
            real = os.path.realpath(path)
            if any(_lies_in(real, each) for each in self.folders):
                found = real
            elif _lies_in(path, folder) and any(_lies_in(real, each) for each in self.behind):
                found = path
            else:
                outside = True
                continue
            if os.path.isfile(found):
                return found
        if outside:
            raise Dropped(f"the image lies outside the data's folder: {shown(name)}")
        raise Dropped(f"there is no image {shown(name)}")

    def find_or_decode(self, value: Any, index: str) -> str | bytes:
        """As `find`; also base64 of a file, or the index of an earlier row that holds one."""
        name = value.strip() if isinstance(value, str) else value
        try:
            image = self.find(name)
        except Dropped:
            if isinstance(name, str) and name in self.shared:
                image = self.shared[name]
            elif isinstance(name, str) and (data := _decoded(name)):
                image_size(data)
                image = data
            else:
                raise
        self.shared[index] = image
        return image

    def name(self, image: str | bytes) -> str:
        """What tells a panorama from others, the same on every machine."""
        if isinstance(image, bytes):
            return digest(image)
        return min((os.path.relpath(image, folder) for folder in self.folders if _lies_in(image, folder)), key=len)


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _decoded(value: str) -> bytes | None:
    if len(value) < 64:
        return None
    try:
        return b64decode(value.split("base64,")[-1], validate=True)
    except (binascii.Error, ValueError):
        return None


def image_size(image: str | bytes) -> tuple[int, int]:
    """Width and height; nothing is decoded."""
    try:
        with open_image(image) as opened:
            width, height = opened.size
    except (ValueError, OSError) as error:
        raise Dropped(f"the image cannot be opened: {shown(str(error))}") from None
    return width, height
