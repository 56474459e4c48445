"""The same question about a panorama that is turned or tilted, with the answer that is right then."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..headings_panorama import elect, turned_back
from ..places_panorama import turned_words, wrap
from .answers import compare_places, normalise, places_of
from .items import Item


@dataclass(frozen=True)
class Variant:
    """How a panorama is shown; degrees.

    Attributes:
        heading: to the right, that the observer has turned by.
        pitch, roll: of a camera that was not level: looking up, and leaning to the right.
    """

    heading: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0

    @property
    def name(self) -> str:
        """As files name it: the heading, or the tilt."""
        tilt = [f"{way} {value:g}" for way, value in (("pitch", self.pitch), ("roll", self.roll)) if value]
        return ", ".join(tilt) or f"{self.heading:g}"


def variants_of(turn: int = 1, tilt: float = 0.0) -> list[Variant]:
    """As given, at `turn` headings in all, and tilted by `tilt` degrees of pitch and of roll."""
    tilts = [Variant(pitch=tilt), Variant(roll=tilt)] if tilt else []
    return [*(Variant(360 * index / turn) for index in range(turn)), *tilts]


def turned_item(item: Item, heading: float) -> Item | None:
    """The question for an observer who has turned to the right.

    Returns:
        The item with places, targets and words of direction turned along; `None` where that cannot be: `turns` is
        "no", or the words know eight sectors and the heading lies between them.
    """
    if heading % 360 == 0:
        return item
    if item.more.get("turns") == "no":
        return None
    changed: dict[str, Any] = {}
    if item.places is not None:
        changed["places"] = [place.turned(heading) for place in item.places]
    if "target_yaw" in item.more:
        low, high = item.more["target_yaw"]
        changed["more"] = {**item.more, "target_yaw": [low - heading, high - heading]}
    if item.more.get("turns") == "direction":
        if heading % 45:
            return None
        changed["references"] = [turned_words(text, heading) for text in item.references]
        changed |= _turned_options(item, heading)
    return dataclasses.replace(item, **changed)


def _turned_options(item: Item, heading: float) -> dict[str, Any]:
    """Options turned along. Where the turned ones are the same words, they stay in their order and the right key
    moves: a model that always says the same letter does not pass for one that has turned."""
    turned = [(key, turned_words(text, heading)) for key, text in item.options]
    before = {normalise(text): key for key, text in item.options}
    after = {normalise(text): key for key, text in turned}
    if set(before) != set(after) or len(before) < len(item.options):
        return {"options": turned}
    right = next((text for text, key in after.items() if key == item.key), None)
    return {"key": item.key if right is None else before[right]}


def answers_turned(item: Item, first: dict[str, Any], other: dict[str, Any], heading: float) -> bool:
    """Whether an answer turned as the panorama did, right or wrong; what was not understood did not. Places have to
    overlap by an IoU of 0.5, directions to be within 15 degrees of yaw and of pitch.

    Args:
        item: as it was asked at heading 0.
        first, other: the judged answers at heading 0 and at `heading`.
        heading: degrees.
    """
    if not first["read"] or not other["read"]:
        return False
    if "target_yaw" in item.more and not item.options:
        pairs = [re.findall(r"-?\d+(?:\.\d+)?", each["read"]) for each in (first, other)]
        apart = wrap(float(pairs[0][0]) - heading - float(pairs[1][0]))
        return abs(apart) <= 15 and abs(float(pairs[0][1]) - float(pairs[1][1])) <= 15
    if item.places is not None and not item.options:
        places, others = ([*places_of(each["read"])] for each in (first, other))
        if item.places and not places:  # what says nothing cannot turn
            return False
        return bool(compare_places([place.turned(heading) for place in places], others)["right"])
    words = first["read"]
    if item.more.get("turns") == "direction":
        words = turned_words(words, heading)
    return normalise(words) == normalise(other["read"])


def turned_pixels(pixels: np.ndarray, heading: float) -> np.ndarray:
    """An equirectangular image [H, W, C] as an observer sees it who has turned to the right, to the nearest column."""
    return np.roll(pixels, -round(heading / 360 * pixels.shape[1]), axis=1)


def turn_report(
    items: Sequence[Item], judged: dict[tuple[str, str], dict[str, Any]], variants: Sequence[Variant]
) -> dict[str, Any]:
    """What turning and tilting do to the answers.

    Args:
        items: as they were given.
        judged: by id and name of the variant.
        variants: all that were asked.

    Returns:
        `turn`: accuracy at each heading over the questions that were asked at all of them, the `spread` between the
        best and the worst, `vote` (accuracy of the answers that most headings give), `consistency` (the share of
        answers at other headings that turned as the panorama did), and how many questions were `left_out`; `tilt`:
        accuracy by tilt, and as given.
    """
    turns = [variant for variant in variants if not (variant.pitch or variant.roll)]
    tilts = [variant for variant in variants if variant.pitch or variant.roll]
    scored = [item for item in items if judged[item.id, "0"]["right"] is not None]
    report: dict[str, Any] = {}
    if len(turns) > 1:
        report["turn"] = _turning(scored, judged, turns)
    if tilts:
        names = ["0", *(variant.name for variant in tilts)]
        report["tilt"] = {"count": len(scored), "accuracy": {name: _share(scored, judged, name) for name in names}}
    return report


def _turning(
    items: Sequence[Item], judged: dict[tuple[str, str], dict[str, Any]], turns: Sequence[Variant]
) -> dict[str, Any]:
    asked = [item for item in items if all((item.id, variant.name) in judged for variant in turns)]
    stay = sum(item.more.get("turns") == "no" for item in items)
    pairs = [
        answers_turned(item, judged[item.id, "0"], judged[item.id, variant.name], variant.heading)
        for item in asked
        for variant in turns[1:]
    ]
    accuracy = {variant.name: _share(asked, judged, variant.name) for variant in turns}
    known = [value for value in accuracy.values() if value is not None]
    return {
        "accuracy": accuracy,
        "vote": sum(_elected(item, judged, turns)["right"] for item in asked) / len(asked) if asked else None,
        "spread": max(known) - min(known) if known else None,
        "consistency": sum(pairs) / len(pairs) if pairs else None,
        "pairs": len(pairs),
        "count": len(asked),
        "left_out": {"does not turn": stay, "between the eight directions": len(items) - len(asked) - stay},
    }


def _elected(item: Item, judged: dict[tuple[str, str], dict[str, Any]], turns: Sequence[Variant]) -> dict[str, Any]:
    """The judged answer that most headings give; that at the front to what asks for a heading in numbers."""
    rows = [judged[item.id, variant.name] for variant in turns]
    if "target_yaw" in item.more and not item.options:
        return rows[0]
    said = [row["read"] if item.options else row["answer"] for row in rows]
    turn_words = item.more.get("turns") == "direction"
    votes = [
        None if row.get("error") else turned_back(text, variant.heading, turn_words)
        for row, text, variant in zip(rows, said, turns, strict=True)
    ]
    return rows[elect(votes)[0]]


def _share(items: Sequence[Item], judged: dict[tuple[str, str], dict[str, Any]], name: str) -> float | None:
    return sum(judged[item.id, name]["right"] for item in items) / len(items) if items else None
