"""Augmentation: panoramas turned, mirrored and tilted, each question with the answer that is right then."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..image_processing_panorama import AS_IT_IS, Shown
from ..places_panorama import mirrored_words, moved_places, read_places, turned_words
from ..processing_panorama import STEPS
from .rows import BadSample

# What rows may know of each question: what turning, mirroring and tilting do to it, its own words, and its options.
RULES = {
    "turns": ("same", "direction", "place", "no"),
    "mirrors": ("same", "direction", "place", "no"),
    "tilts": ("same", "no"),
}
KNOWLEDGE = (*RULES, "questions", "options")
Knowledge = dict[str, list[Any]]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Augmentation:
    """Which samples are shown otherwise.

    Args:
        turn: share of the samples, in [0, 1], that are turned to another heading.
        mirror: share whose left and right are exchanged.
        tilt: share that a camera took which was not level.
        tilt_deg: by so many degrees at most.
    """

    turn: float = 0.0
    mirror: float = 0.0
    tilt: float = 0.0
    tilt_deg: float = 5.0

    def __bool__(self) -> bool:
        return max(self.turn, self.mirror, self.tilt) > 0

    def draw(self, seed: int, epoch: int, index: int, step_deg: int) -> Shown:
        """How a sample is shown; it follows from seed, epoch and index alone. Headings are multiples of `step_deg`."""
        generator = np.random.default_rng((seed, epoch, index, 4))
        turned, mirrored, tilted = generator.random(3) < (self.turn, self.mirror, self.tilt)
        heading = step_deg * int(generator.integers(1, 360 // step_deg)) if turned else 0
        size, axis = generator.uniform((0, 0), (self.tilt_deg, 2 * np.pi))
        tilt = (float(size * np.cos(axis)), float(size * np.sin(axis))) if tilted else (0.0, 0.0)
        return Shown(float(heading), bool(mirrored), tilt)


NO_AUGMENTATION = Augmentation()


def knowledge_of(row: dict[str, Any]) -> Knowledge | None:
    """What a row knows of its questions (lists, or JSON of them); `None` where it does not know how they turn."""
    known = {name: row[name] for name in KNOWLEDGE if row.get(name) is not None}
    return {name: _list_of(name, value) for name, value in known.items()} if "turns" in known else None


def _list_of(name: str, value: Any) -> list[Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    return value if isinstance(value, list) else [None]  # which fits no conversation


def heading_step(known: Knowledge) -> int:
    """Degrees between the headings of a sample: sectors are known at multiples of 45, places at whole ones."""
    return 45 if "direction" in known["turns"] else 1


def limited(shown: Shown, known: Knowledge) -> Shown:
    """Mirrored and tilted only where a row knows what that does."""
    tilt = shown.tilt if "tilts" in known else AS_IT_IS.tilt
    return Shown(shown.yaw_offset, shown.mirrored and "mirrors" in known, tilt)


def augmented(messages: Messages, known: Knowledge, shown: Shown) -> Messages | None:
    """A conversation about a panorama that is shown otherwise.

    A question is left out whose answer is not known then: by the rules of the row, where its answer has steps, and
    where places are in the words of either that no rule moves.

    Args:
        messages: with one panorama, in the first question; each question has one answer.
        known: of its questions.
        shown: how.

    Returns:
        The messages, `None` where no question is left or the conversation is not of this kind.

    Raises:
        BadSample: for a row whose knowledge does not fit its conversation.
    """
    first = [message for message in messages if message["role"] != "system"]
    before = messages[: len(messages) - len(first)]
    pairs = list(zip(first[::2], first[1::2], strict=False))
    images = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if [message["role"] for message in first] != ["user", "assistant"] * len(pairs) or len(images) != 1:
        return None
    if not any(part is images[0] for part in first[0]["content"]):
        return None
    for name, values in known.items():
        if len(values) != len(pairs):
            raise BadSample(f"augmentation: the column {name!r} must be a list of {len(pairs)}, one entry a question")
        if wrong := [value for value in values if name in RULES and value not in RULES[name]]:
            raise BadSample(f"augmentation: {name!r} must be of {', '.join(RULES[name])}, got {wrong[0]!r}")
    kept: Messages = []
    for number, (question, answer) in enumerate(pairs):
        own = {name: values[number] for name, values in known.items()}
        texts = [_text(message) for message in (question, answer)]
        if (changed := _question(texts[0], texts[1], own, shown)) is not None:
            kept += [_said(message, text) for message, text in zip((question, answer), changed, strict=True)]
    if not kept:
        return None
    image = {**images[0], "yaw_offset": shown.yaw_offset, "mirrored": shown.mirrored, "tilt": shown.tilt}
    return [*before, {**kept[0], "content": [image, *kept[0]["content"]]}, *kept[1:]]


def _text(message: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def _said(message: dict[str, Any], text: str) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": text}]}


def _question(question: str, answer: str, own: dict[str, Any], shown: Shown) -> tuple[str, str] | None:
    """A question and its answer as they are right then; `None` where that is not known."""
    turns = own["turns"] if shown.yaw_offset else "same"
    mirrors = own["mirrors"] if shown.mirrored else "same"
    tilts = own["tilts"] if any(shown.tilt) else "same"
    if "no" in (turns, mirrors, tilts) or (turns == "direction" and shown.yaw_offset % 45):
        return None
    moves = "place" in (turns, mirrors)
    if any(tag in answer for tag in STEPS) or read_places(question) or (read_places(answer) and not moves):
        return None

    def changed(text: str) -> str:
        text = turned_words(text, shown.yaw_offset) if turns == "direction" else text
        return mirrored_words(text) if mirrors == "direction" else text

    if moves:
        moved = moved_places(answer, shown.yaw_offset * (turns == "place"), mirrors == "place")
        if moved is None:
            return None
        answer = moved
    if "direction" in (turns, mirrors):
        for key, text in own.get("options") or ():
            question = _replaced(question, f"{key}. {text}", f"{key}. {changed(text)}")
    if mirrors == "direction":
        words = own.get("questions", question)
        question = _replaced(question, words, mirrored_words(words))
    return question, changed(answer)


def _replaced(text: str, words: Any, other: str) -> str:
    if not isinstance(words, str) or words not in text:
        raise BadSample(f"augmentation: {words!r} of the row is not in the question {text!r}")
    return text.replace(words, other, 1)


def missing_knowledge(augmentation: Augmentation, columns: Sequence[str]) -> list[str]:
    """What rows with these columns lack for an augmentation, in words."""
    done = {"turns": "turned, mirrored or tilted", "mirrors": "mirrored", "tilts": "tilted"}
    wanted = {"turns": bool(augmentation), "mirrors": augmentation.mirror > 0, "tilts": augmentation.tilt > 0}
    lacking = [name for name, is_wanted in wanted.items() if is_wanted and name not in columns]
    return [f"no column {name!r}: not {done[name]}" for name in (lacking[:1] if "turns" in lacking else lacking)]
