"""Places on the sphere: bounding fields of view (BFoV), how two are compared, how they are read and drawn.

A BFoV is `[yaw, pitch, x_fov, y_fov]` in degrees, the convention of 360-Indoor (Chou et al., WACV 2020) and
PanoSpace-Bench: the rectangle ``yaw - x_fov/2 .. yaw + x_fov/2`` by ``pitch - y_fov/2 .. pitch + y_fov/2`` of the
sphere, cut off at the poles. Axes as in `geometry_panorama`: yaw in [-180, 180) and to the right, pitch in [-90, 90]
and up. A point is the centre of one. Directions are also named by the words for eight sectors of yaw.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .geometry_panorama import ray_angles
from .options_panorama import check_number

SECTORS = ("front", "front-right", "right", "back-right", "back", "back-left", "left", "front-left")
_SECTOR = re.compile(r"\b(?:(front|back)([-_ ]?)(left|right)|front|back|left|right)\b", re.IGNORECASE)
_SIDE = re.compile("left|right", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left"}


class BFoV(NamedTuple):
    """A place; degrees."""

    yaw: float
    pitch: float
    x_fov: float
    y_fov: float

    def rounded(self) -> list[int]:
        """In whole degrees, the extents at least 1, as answers hold it."""
        yaw, pitch = (round(value) for value in self[:2])
        return [int(wrap(yaw)), pitch, *(max(1, round(value)) for value in self[2:])]

    @property
    def edges(self) -> tuple[float, float]:
        """Lower and upper pitch, cut off at the poles."""
        return max(-90.0, self.pitch - self.y_fov / 2), min(90.0, self.pitch + self.y_fov / 2)

    @property
    def area(self) -> float:
        """Steradians."""
        low, high = (math.sin(math.radians(edge)) for edge in self.edges)
        return math.radians(min(self.x_fov, 360.0)) * (high - low)

    def turned(self, heading: float) -> BFoV:
        """Where it lies for an observer who has turned to the right by `heading` degrees; as it was where it goes all
        around."""
        return self if self.x_fov >= 360 else self._replace(yaw=wrap(self.yaw - heading))

    def mirrored(self) -> BFoV:
        """Where it lies in the panorama whose left and right are exchanged."""
        return self._replace(yaw=wrap(-self.yaw))


class NamedPlace(NamedTuple):
    """A place in an answer, what it is called there (empty where it has no name), and in [0, 1] how sure of it the
    answer says that it is (`None` where it says nothing)."""

    label: str
    place: BFoV
    score: float | None = None


def wrap(yaw: float) -> float:
    """An angle in [-180, 180)."""
    return (yaw + 180) % 360 - 180


def check_bfov(values: Sequence[float]) -> BFoV:
    """Four numbers as a place.

    Raises:
        ValueError: for other than four finite numbers, a pitch outside [-90, 90], or extents outside (0, 360] and
            (0, 180].
    """
    try:
        yaw, pitch, x_fov, y_fov = (float(check_number("a part of it", value, 0, -math.inf)) for value in values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"a place must be [yaw, pitch, x_fov, y_fov] in degrees, got {values!r}") from error
    if not (-90 <= pitch <= 90 and 0 < x_fov <= 360 and 0 < y_fov <= 180):
        raise ValueError(
            f"pitch must be in [-90, 90], x_fov in (0, 360] and y_fov in (0, 180] degrees, got {list(values)}"
        )
    return BFoV(wrap(yaw), pitch, x_fov, y_fov)


def bfov_of_rays(rays: np.ndarray, size: float = 0.0) -> BFoV | None:
    """The smallest place that holds all rays.

    The widest gap between their yaws is left out, so that what crosses the seam is no wider than it is. What holds a
    pole goes all around.

    Args:
        rays: unit rays [N, 3].
        size: degrees that a ray stands for, such as a pixel of a mask; the place is larger by that.

    Returns:
        `None` where there is no ray.
    """
    if len(rays) == 0:
        return None
    yaw, pitch = ray_angles(np.asarray(rays, dtype=np.float64))
    return _smallest(yaw, pitch, np.full(len(yaw), size), size)


def bfov_of_mask(mask: np.ndarray) -> BFoV | None:
    """The smallest place that holds all pixels of an equirectangular mask [H, W]; `None` where it is empty."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return None
    yaw = ((columns + 0.5) / width - 0.5) * 360
    pitch = (0.5 - (rows + 0.5) / height) * 180
    return _smallest(yaw, pitch, np.full(len(yaw), 360 / width), 180 / height)


def _smallest(yaw: np.ndarray, pitch: np.ndarray, width: np.ndarray, height: float) -> BFoV:
    low, high = max(-90.0, pitch.min() - height / 2), min(90.0, pitch.max() + height / 2)
    distinct, which = np.unique(yaw, return_index=True)
    gaps = np.diff(distinct, append=distinct[0] + 360)  # from each to the next, around
    widest = int(gaps.argmax())
    extent = 360 - gaps[widest] + width[which].max()
    start = distinct[(widest + 1) % len(distinct)] - width[which].max() / 2
    extent = 360.0 if extent > 360 - 1e-6 else float(extent)
    middle = 0.0 if extent == 360 else wrap(float(start) + extent / 2)
    return BFoV(middle, float(low + high) / 2, extent, float(high - low))


def bfov_iou(first: BFoV, second: BFoV) -> float:
    """Intersection over union of two places by their area on the sphere, in [0, 1]; seam and poles included.

    Areas are those of spherical rectangles, ``width * (sin(high) - sin(low))``. Two wide ones may meet on both sides.
    """
    low, high = (pick(a, b) for pick, a, b in zip((max, min), first.edges, second.edges, strict=True))
    if high <= low:
        return 0.0
    apart = abs(wrap(second.yaw - first.yaw))
    widths = [min(place.x_fov, 360.0) for place in (first, second)]
    shared = sum(
        max(0.0, min(widths[0] / 2, centre + widths[1] / 2) - max(-widths[0] / 2, centre - widths[1] / 2))
        for centre in (apart - 360, apart, apart + 360)
    )
    common = math.radians(shared) * (math.sin(math.radians(high)) - math.sin(math.radians(low)))
    union = first.area + second.area - common
    return common / union if union > 0 else 0.0


def great_circle(first: Sequence[float], second: Sequence[float]) -> float:
    """Degrees between two directions (yaw, pitch), in [0, 180], by the formula that is exact at both ends (Vincenty
    on a sphere)."""
    turn = math.radians(second[0] - first[0])
    a, b = math.radians(first[1]), math.radians(second[1])
    across = math.hypot(
        math.cos(b) * math.sin(turn), math.cos(a) * math.sin(b) - math.sin(a) * math.cos(b) * math.cos(turn)
    )
    along = math.sin(a) * math.sin(b) + math.cos(a) * math.cos(b) * math.cos(turn)
    return math.degrees(math.atan2(across, along))


def in_bfov(place: BFoV, yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Which directions lie in a place."""
    low, high = place.edges
    return (np.abs((yaw - place.yaw + 180) % 360 - 180) <= place.x_fov / 2) & (pitch >= low) & (pitch <= high)


def draw_bfov(
    panorama: Image.Image, place: BFoV, colour: str = "red", label: str = "", width: int | None = None
) -> Image.Image:
    """A copy of an equirectangular image with a place drawn in: its edges, across the seam where it crosses it.

    Args:
        panorama: as it is shown, all around.
        place: to draw.
        colour: of the line, as Pillow names it.
        label: words beside it.
        width: of the line in pixels; a three-hundredth of the image where it is not given.

    Raises:
        ValueError: for what is no place on the sphere (:func:`check_bfov`).
    """
    place = check_bfov(place)
    drawn = panorama.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    columns, rows = drawn.size
    width = width or max(1, columns // 300)
    low, high = place.edges
    top, bottom = (0.5 - high / 180) * rows, (0.5 - low / 180) * rows
    left = ((place.yaw - place.x_fov / 2) / 360 + 0.5) * columns
    right = left + min(place.x_fov, 360.0) / 360 * columns
    for shift in (-columns, 0, columns):  # the same place, seen around the circle
        if right + shift >= 0 and left + shift <= columns:
            edges = (left + shift, top, right + shift, bottom)
            if place.x_fov >= 360:
                pen.line([edges[:2], (edges[2], edges[1])], colour, width)
                pen.line([(edges[0], edges[3]), edges[2:]], colour, width)
            else:
                pen.rectangle(edges, outline=colour, width=width)
    if label:
        pen.text((left % columns + width, min(top + width, rows - 12)), label, fill=colour)
    return drawn


_NUMBER = r"[-+−–]?\s*\d+(?:\.\d+)?"
_SPACED = r"[-+−–]?\s*\d(?: ?\d)*(?:\.\d+)?"  # inside brackets: digits may be tokens of their own
_NAMES = {
    "yaw": 0,
    "pitch": 1,
    "x_fov": 2,
    "y_fov": 3,
    "xfov": 2,
    "yfov": 3,
    "h_fov": 2,
    "v_fov": 3,
    "hfov": 2,
    "vfov": 3,
}
_LIST = re.compile(rf"[\[(]\s*({_SPACED}(?:\s*°?\s*,\s*{_SPACED}){{3}})\s*°?\s*,?\s*[\])]")
_BARE = re.compile(rf"(?<![\d.\]])({_NUMBER}(?:\s*°?\s*,\s*{_NUMBER}){{3}})\s*°?(?![\d,])")
_PAIR = re.compile(
    rf"[\"']?\b(x_?fov|y_?fov|h_?fov|v_?fov|yaw|pitch)[\"']?\s*(?:=|:|is)?\s*({_NUMBER})\s*°?", re.IGNORECASE
)
_GOES_ON = re.compile(rf"\s*°?\s*,\s*{_NUMBER}")  # a list of more than four numbers is no place
_BEGAN = re.compile(r"\d\s*°?\s*,\s*$")
_LABEL = re.compile(r"[\"']?(?:label|name|object)[\"']?\s*[:=]\s*[\"']([^\"']*)[\"']", re.IGNORECASE)
_SCORE = re.compile(r"[\"']?\b(?:score|confidence)[\"']?\s*[:=]\s*(1(?:\.0+)?|0?\.\d+|0)(?![\d.])", re.IGNORECASE)


def read_places(text: str) -> list[NamedPlace]:
    """The places that an answer names, in its order, in the ways in which models write them: `[12, -5, 20, 10]`,
    `(12, -5, 20, 10)`, bare numbers, JSON with `bfov` and `label` (and `score`), `yaw=12 pitch=-5 x_fov=20 y_fov=10`.

    What is no place on the sphere (a pitch beyond the poles, an extent of zero) is left out: nothing is invented, and
    an answer without places gives none.
    """
    found: list[tuple[int, int, BFoV]] = []
    for pattern in (_LIST, _BARE):
        for match in pattern.finditer(text):
            inside = any(start < match.end() and match.start() < end for start, end, _ in found)
            longer = _GOES_ON.match(text, match.end()) or _BEGAN.search(
                text[max(0, match.start() - 20) : match.start()]
            )
            if pattern is _BARE and longer:
                continue
            if not inside and (place := _as_place(match[1].split(","))) is not None:
                found.append((match.start(), match.end(), place))
        if found:
            break
    if not found:
        found = _named_numbers(text)
    found.sort(key=lambda each: each[:2])
    before = 0
    named = []
    for start, end, place in found:
        named.append(NamedPlace(_label(text, before, start, end), place, _score(text, before, start, end)))
        before = end
    return named


def _as_place(numbers: Sequence[str]) -> BFoV | None:
    values = [float(re.sub(r"[\s°]", "", number).replace("−", "-").replace("–", "-")) for number in numbers]
    try:
        return check_bfov(values)
    except ValueError:
        return None


def _named_numbers(text: str) -> list[tuple[int, int, BFoV]]:
    """Places written as four named numbers, in any order."""
    found = []
    values: dict[int, str] = {}
    start = 0
    for match in _PAIR.finditer(text):
        which = _NAMES[match[1].lower()]
        if which in values:  # the next place begins
            values = {}
        start = match.start() if not values else start
        values[which] = match[2]
        if len(values) == 4:
            place = _as_place([values[index] for index in range(4)])
            if place is not None:
                found.append((start, match.end(), place))
            values = {}
    return found


def _beside(pattern: re.Pattern[str], text: str, before: int, start: int, end: int) -> str | None:
    """What JSON says beside a place, in the same braces."""
    opened, closed = text.rfind("{", before, start), text.find("}", end)
    match = pattern.search(text, opened, closed) if opened >= 0 and closed >= 0 else None
    return None if match is None else match[1]


def _score(text: str, before: int, start: int, end: int) -> float | None:
    score = _beside(_SCORE, text, before, start, end)
    return None if score is None else float(score)


def _label(text: str, before: int, start: int, end: int) -> str:
    """What a place is called: a JSON label beside it, or the words before it."""
    if (label := _beside(_LABEL, text, before, start, end)) is not None:
        return label
    words = text[before:start].rpartition("}")[2].split("\n")[-1]
    words = re.sub(r"[\"'{\[(]?\b(?:bfov|place|box|position)\b[\"']?\s*[:=]?\s*$", "", words, flags=re.IGNORECASE)
    words = re.sub(r"(?:\s*\b(?:is|are|at|lies|stands)\s*:?)+\s*$", "", words.strip(" \t,;:[]{}()\"'-=."))
    return words.strip(" \t,;:[]{}()\"'-=.")


def write_places(places: Sequence[NamedPlace] | Sequence[BFoV]) -> str:
    """Places as answers hold them: one as `[yaw, pitch, x_fov, y_fov]`, several as a JSON list, none as `[]`; whole
    degrees."""
    plain = [place.place if isinstance(place, NamedPlace) else place for place in places]
    numbers = [place.rounded() for place in plain]
    return json.dumps(numbers[0] if len(numbers) == 1 else numbers)


def moved_places(text: str, heading: float = 0.0, mirrored: bool = False) -> str | None:
    """A text whose places are those for an observer who has turned to the right, and then those in the panorama whose
    left and right are exchanged. Several are a list from left to right, which they are again.

    Args:
        text: with places as `[yaw, pitch, x_fov, y_fov]`, any number of them.
        heading: degrees.
        mirrored: whether left and right are exchanged.

    Returns:
        The text; `None` where this cannot be told: places written in another way, several in another order, or of
        several one on the seam, which may be the first or the last.
    """
    found = list(_LIST.finditer(text))
    if len(found) != len(read_places(text)):
        return None
    before: list[BFoV] = []
    moved: list[tuple[BFoV, str]] = []
    for match in found:
        place = _as_place(match[1].split(","))
        if place is None:
            return None
        before.append(place)
        place = place.turned(heading)
        place = place.mirrored() if mirrored else place
        moved.append((place, _with_yaw(match, place.yaw)))
    if len(moved) > 1:
        moved = moved[::-1] if mirrored else moved
        starts = [i for i, (place, _) in enumerate(moved) if moved[i - 1][0].yaw > place.yaw]
        in_order = before == sorted(before, key=lambda place: place.yaw) or any(map(_is_on_seam, before))
        if not in_order or len(starts) > 1 or any(_is_on_seam(place) for place, _ in moved):
            return None
        start = starts[0] if starts else 0
        moved = moved[start:] + moved[:start]
    written = iter(moved)
    return _LIST.sub(lambda _: next(written)[1], text)


def turned_places(text: str, heading: float) -> str | None:
    """A text whose places are those for an observer who has turned to the right, each where it stands.

    Args:
        text: with places as `[yaw, pitch, x_fov, y_fov]`, any number of them.
        heading: degrees.

    Returns:
        The text, whole degrees rounded to such again; `None` for places that are written in another way.
    """

    def turn(match: re.Match[str]) -> str:
        place = _as_place(match[1].split(","))
        if place is None:
            return match[0]
        yaw = place.turned(heading).yaw
        return _with_yaw(match, yaw if "." in match[1] else wrap(round(yaw)))

    places = [_as_place(match[1].split(",")) for match in _LIST.finditer(text)]
    if sum(place is not None for place in places) != len(read_places(text)):
        return None
    return _LIST.sub(turn, text)


def _with_yaw(match: re.Match[str], yaw: float) -> str:
    """A place as it was written, at another yaw."""
    numbers = match[1].split(",")
    return match[0].replace(match[1], ",".join([re.sub(_SPACED, f"{yaw:g}", numbers[0], count=1), *numbers[1:]]))


def _is_on_seam(place: BFoV) -> bool:
    """Whether a place in whole degrees may reach the seam."""
    return abs(wrap(place.yaw + 180)) <= place.x_fov / 2 + 1


# Words of direction


def turned_words(text: str, heading: float) -> str:
    """A text with each of the eight words of direction as an observer says it who has turned to the right by a multiple
    of 45 degrees; case and hyphens as they were."""

    def turn(match: re.Match[str]) -> str:
        sector = SECTORS.index(_sector(match))
        word = SECTORS[(sector - round(heading / 45)) % 8]
        word = word.replace("-", "-" if match[2] is None else match[2])
        return _as_written(word, match[0])

    return _SECTOR.sub(turn, text)


def _sector(match: re.Match[str]) -> str:
    return (f"{match[1]}-{match[3]}" if match[1] else match[0]).lower()


def mirrored_words(text: str) -> str:
    """A text with left and right exchanged in each of the eight words of direction; case and hyphens as they were."""

    def mirror(match: re.Match[str]) -> str:
        return _SIDE.sub(lambda side: _as_written(_OTHER_SIDE[side[0].lower()], side[0]), match[0])

    return _SECTOR.sub(mirror, text)


def _as_written(word: str, before: str) -> str:
    """A word in the case of the one that it stands for."""
    return word.upper() if before.isupper() else word.capitalize() if before[0].isupper() else word


def direction_in_words(text: str) -> float | None:
    """The yaw of the one word of direction in a text; `None` where there is none, or another one."""
    found = {_sector(match) for match in _SECTOR.finditer(text)}
    return wrap(45.0 * SECTORS.index(found.pop())) if len(found) == 1 else None
