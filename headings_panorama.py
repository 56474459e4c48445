"""One question at several headings: turning a panorama changes nothing of what is there, so that answers can vote.

A flat picture allows no such check. What a model says at one heading and not at the others is more often wrong than
what it says at most of them: self-consistency (Wang et al. 2022, arXiv:2203.11171) with turns in place of samples.
Taken is the answer that most others agree with, as in minimum Bayes risk decoding (Kumar and Byrne 2004).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .conversations_panorama import Message
from .options_panorama import check_whole
from .places_panorama import (
    NamedPlace,
    bfov_iou,
    direction_in_words,
    read_places,
    turned_places,
    turned_words,
    wrap,
)

_MOST = 72
_WITH_WORDS = (1, 2, 4, 8)  # words know eight directions
_SAME = 0.5  # IoU of one place named twice


def check_headings(headings: Any, turn_words: Any) -> list[float]:
    """The headings in degrees, the front first.

    Raises:
        ValueError: for what is no number of headings, and where it is not said what becomes of words of direction.
    """
    count = check_whole("headings", headings, 4)
    if count > _MOST:
        raise ValueError(f"headings must be at most {_MOST}, got {count}. Typical value: 4")
    if not isinstance(turn_words, bool) and (count > 1 or turn_words is not None):
        raise ValueError(
            "with headings, turn_words must be given: True where words such as 'front-left' in answers are seen from "
            f"the front of the panorama, False where they are not or do not occur. Got {turn_words!r}"
        )
    if turn_words and count not in _WITH_WORDS:
        raise ValueError(
            f"with turn_words=True headings must be of {_WITH_WORDS}, got {count}: words know eight directions"
        )
    return [360 / count * number for number in range(count)]


def turned_chat(messages: Sequence[Message], heading: float) -> list[Message]:
    """A chat for an observer who has turned to the right: its panoramas turned, and the places in its words.

    Args:
        messages: contents are lists of parts.
        heading: degrees.

    Raises:
        ValueError: for further views, which were cut for another heading, and for places that cannot be turned.
    """
    return [{**each, "content": [_turned_part(part, heading) for part in each["content"]]} for each in messages]


def _turned_part(part: Message, heading: float) -> Message:
    if part.get("further_views"):
        raise ValueError("headings and further views do not go together: leave one of them out")
    if part["type"] == "image":
        return {**part, "yaw_offset": wrap((part.get("yaw_offset") or 0.0) + heading)}
    if part["type"] == "text" and heading:
        text = turned_places(part["text"], heading)
        if text is None:
            raise ValueError(
                f"a place in {part['text']!r} is not written as [yaw, pitch, x_fov, y_fov], and cannot turn"
            )
        return {**part, "text": text}
    return part


def turned_back(answer: str, heading: float, turn_words: bool) -> str | None:
    """An answer as somebody says it who looks to the front: its places, with `turn_words` its words of direction; a
    list by direction (`right: …; back: …`) begins at the front.

    Returns:
        `None` where a place is written so that it cannot be turned.
    """
    text = turned_places(answer, -heading) if heading else answer
    if text is None or not turn_words:
        return text
    return _from_the_front(turned_words(text, -heading))


def _from_the_front(text: str) -> str:
    parts = [part.strip() for part in text.rstrip(" .").split(";")]
    yaws = [direction_in_words(part.partition(":")[0]) if ":" in part else None for part in parts]
    if len(parts) < 2 or None in yaws:
        return text
    order = sorted(range(len(parts)), key=lambda number: (yaws[number] or 0.0) % 360)
    return "; ".join(parts[number] for number in order) + text[len(text.rstrip(" .")) :]


def elect(answers: Sequence[str | None]) -> tuple[int, float]:
    """The answer that most others say, too: the same words, and places that overlap.

    Args:
        answers: turned back, of which the first is said at the front; `None` has no vote.

    Returns:
        Its number, the first of several, and the share of all answers that say it.
    """
    read = [None if each is None else (_words(each), read_places(each)) for each in answers]
    votes = [sum(one is not None and other is not None and _agree(one, other) for other in read) for one in read]
    return votes.index(max(votes)), max(votes) / len(votes)


def _words(text: str) -> list[str]:
    """What is said beside places, which are compared as such."""
    return re.findall(r"[^\W\d][\w'-]*" if read_places(text) else r"[\w'-]+", text.casefold())


def _agree(one: tuple[list[str], list[NamedPlace]], other: tuple[list[str], list[NamedPlace]]) -> bool:
    (words, places), (other_words, other_places) = one, other
    if words != other_words or len(places) != len(other_places):
        return False
    left = [each.place for each in other_places]
    for own in places:
        best = max(left, key=lambda place: bfov_iou(own.place, place))
        if bfov_iou(own.place, best) < _SAME:
            return False
        left.remove(best)
    return True
