"""A question about a panorama with what counts as right, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..places_panorama import BFoV


@dataclass
class Item:
    """One question.

    Attributes:
        id: names the question in its data set; no two are the same.
        image: path of the panorama, or the bytes of its file.
        question: words, without options.
        references: answers that are right, any of them; the texts of captions.
        kind: of question, by which accuracies are told apart.
        group: of kinds, over which a data set's headline is a mean; the kind where the set has none.
        panorama: names the panorama: questions of one are not independent.
        options: of a multiple choice: (key, text) in the order they are shown.
        key: of the right option.
        places: what is to be pointed at; `None` where the question is not about places, empty where nothing is there.
        more: what else the file says, for judging and the report (intervals, slices, steps, depth).
    """

    id: str
    image: str | bytes
    question: str
    references: list[str]
    kind: str = "answer"
    group: str = ""
    panorama: str = ""
    options: list[tuple[str, str]] = field(default_factory=list)
    key: str | None = None
    places: list[BFoV] | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class ReadItems:
    """The questions of a file.

    Attributes:
        items: in the order of the file.
        dropped: what is no question, with `row` and `reason`; nothing is left out without being here.
        format: that it was read as.
    """

    items: list[Item]
    dropped: list[dict[str, Any]]
    format: str
