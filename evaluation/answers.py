"""What an answer says: words made comparable, the option that is meant, and places set against expected ones."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..places_panorama import BFoV, bfov_iou, great_circle, read_places, wrap

LONGEST = 20_000  # characters of an answer that are read; a longer one is cut off
NORMALISATION = (
    "Unicode NFKC, casefold; apostrophes and the commas of thousands off, other punctuation and symbols become spaces "
    "(a decimal point, and a minus before a number, stay); the articles a, an, the off; zero to twelve as digits; "
    "white space collapsed"
)
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_APOSTROPHES = re.compile(r"['’`]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_KEPT = re.compile(r"(?<=\d)\.(?=\d)|(?<![\w.])-(?=\d)")


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Words by which two answers are compared; `NORMALISATION` says how."""
    text = unicodedata.normalize("NFKC", text[:LONGEST]).replace("−", "-").casefold()
    text = _THOUSANDS.sub("", _APOSTROPHES.sub("", text))
    kept = {match.start() for match in _KEPT.finditer(text)}
    plain = "".join(
        " " if unicodedata.category(letter)[0] in "PSZC" and place not in kept else letter
        for place, letter in enumerate(text)
    )
    words = [_DIGITS.get(word, word) for word in plain.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def says(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is one of the references, both normalised; an empty one never is."""
    words = normalise(answer)
    return words != "" and any(words == normalise(reference) for reference in references)


def chosen_option(
    answer: str, options: Sequence[tuple[str, str]], references: Sequence[str] = (), key: str = ""
) -> str:
    """The key of the option that an answer means; empty where it means none, or two at once.

    Taken, in this order: the key alone (`B`, `b`, `(B)`, `**B**`); the key before its text (`B. text`, `B: text`,
    `(B) text`, `B) text`, `B - text`); one key that is marked (in brackets, at the start of a line before one of
    `. : ) -`, or after "answer", "option", "choice"), unless the text of another option alone is named with it; the
    text of one option, as the whole answer or as its start or end; a reference of the question as the whole answer.

    Args:
        answer: of the model.
        options: (key, text).
        references: texts that are right as well.
        key: of the right option, which such a reference stands for.
    """
    answer = answer[:LONGEST].strip()
    texts = {name: normalise(text) for name, text in options}
    words = normalise(answer)
    bare = answer.strip(" \t\n.,:;()[]{}*\"'`").casefold()
    as_key = [name for name in texts if name.casefold() == bare]
    as_text = [name for name, text in texts.items() if text and text == words]
    if as_key or as_text:
        meant = {*as_key, *as_text}
        return meant.pop() if len(meant) == 1 else ""
    written = [name for name, text in options if words and words in (normalise(f"{name} : {text}"), f"{name} {text}")]
    if len(written) == 1:
        return written[0]
    marked, named = _marked(answer, list(texts)), _named(words, texts)
    if marked:
        only = next(iter(marked))
        return only if len(marked) == 1 and (not named or only in named) else ""
    if len(named) == 1:
        only = next(iter(named))
        return only if words.startswith(f"{texts[only]} ") or words.endswith(f" {texts[only]}") else ""
    return key if not named and says(answer, references) else ""


def _marked(answer: str, keys: Sequence[str]) -> set[str]:
    """Keys that an answer marks as such."""
    either = "|".join(re.escape(key) for key in sorted(keys, key=len, reverse=True))
    exact = (
        rf"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice|ANSWER|OPTION)\b(?:\s*(?:is|=|:)){{0,2}}[\s*(\[\"']{{0,8}}({either})(?!\w)",
        rf"(?<!\w)({either})(?=[.:)\]](?:\s|$))",
    )
    loose = (
        rf"[(\[]\s{{0,4}}({either})\s{{0,4}}[)\]]",
        rf"^[\s*(\[\"'#>]{{0,8}}({either})(?!\w)[\s*]{{0,4}}(?:[.:)\]]|[-–—]\s|$)",
    )
    found = {match for pattern in exact for match in re.findall(pattern, answer)}
    by_fold = {key.casefold(): key for key in keys}
    for pattern in loose:
        found |= {by_fold[match.casefold()] for match in re.findall(pattern, answer, re.IGNORECASE | re.MULTILINE)}
    return found


def _named(words: str, texts: dict[str, str]) -> set[str]:
    """Options whose text occurs in an answer; one inside the text of another (front in front right) does not count."""
    rest, found = f" {words} ", set()
    for text in sorted(set(texts.values()) - {""}, key=len, reverse=True):
        if f" {text} " in rest:
            found |= {key for key, other in texts.items() if other == text}
            rest = rest.replace(f" {text} ", " \n ")
    return found


# Places


def match_places(expected: Sequence[BFoV], predicted: Sequence[BFoV]) -> list[tuple[int, int]]:
    """Pairs (expected, predicted), one to one, whose IoUs add up to the most; where these say nothing, the nearest."""
    if not expected or not predicted:
        return []
    value = np.array(
        [
            [bfov_iou(wanted, said) + 1e-6 * (1 - great_circle(wanted[:2], said[:2]) / 180) for said in predicted]
            for wanted in expected
        ]
    )
    if len(expected) <= len(predicted):
        return list(enumerate(_assign(-value)))
    return sorted((row, column) for column, row in enumerate(_assign(-value.T)))


def _assign(cost: np.ndarray) -> list[int]:
    """For each row of a cost matrix [n, m], n <= m, the column that makes the sum least (Kuhn, Munkres; with the
    potentials of Jonker and Volgenant)."""
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.zeros(columns + 1, dtype=int)  # row of each column, from 1; column 0 is where a new row enters
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, way = np.full(columns + 1, np.inf), np.zeros(columns + 1, dtype=int)
        used = np.zeros(columns + 1, dtype=bool)
        while owner[column]:
            used[column] = True
            here = owner[column]
            free = ~used[1:]
            reduced = cost[here - 1] - row_price[here] - column_price[1:]
            better = free & (reduced < least[1:])
            least[1:][better], way[1:][better] = reduced[better], column
            following = 1 + int(np.where(free, least[1:], np.inf).argmin())
            step = least[following]
            row_price[owner[used]] += step
            column_price[used] -= step
            least[1:][free] -= step
            column = following
        while column:
            owner[column] = owner[way[column]]
            column = way[column]
    found = {int(row) - 1: column for column, row in enumerate(owner[1:]) if row}
    return [found[row] for row in range(rows)]


def compare_places(expected: Sequence[BFoV], predicted: Sequence[BFoV]) -> dict[str, float | bool | None]:
    """How well predicted places fit the expected ones.

    Returns:
        `iou` and `iou_50`, the sum of the IoUs of the matched and the number of those of at least 0.5, both over the
        larger of the two numbers of places, so that what is missed and what is too much counts as zero;
        `centre_error`, the mean great circle between the centres of the matched in degrees, `None` without any;
        `right`: nothing is missed, nothing is too much, and each IoU is at least 0.5. Nothing and nothing is right.
    """
    if not expected and not predicted:
        return {"right": True, "iou": 1.0, "iou_50": 1.0, "centre_error": None}
    pairs = [(expected[row], predicted[column]) for row, column in match_places(expected, predicted)]
    overlaps = [bfov_iou(*pair) for pair in pairs]
    most, good = max(len(expected), len(predicted)), sum(overlap >= 0.5 for overlap in overlaps)
    errors = [great_circle(wanted[:2], said[:2]) for wanted, said in pairs]
    return {
        "right": good == most,
        "iou": math.fsum(overlaps) / most,
        "iou_50": good / most,
        "centre_error": math.fsum(errors) / len(errors) if errors else None,
    }


def places_of(answer: str) -> list[BFoV]:
    """The places that an answer names."""
    return [named.place for named in read_places(answer[:LONGEST])]


_NUMBER = r"[-+−]?\d+(?:\.\d+)?"
_DIRECTIONS = (
    re.compile(rf"\byaw\b\W{{0,4}}?({_NUMBER})[^\d]{{0,12}}?\bpitch\b\W{{0,4}}?({_NUMBER})", re.IGNORECASE),
    re.compile(rf"[\[(]\s*({_NUMBER})\s*°?\s*,\s*({_NUMBER})\s*°?\s*[\])]"),
)


def direction_of(answer: str) -> tuple[float, float] | None:
    """(yaw, pitch) of the first direction that an answer names: the centre of a place, `yaw=30 pitch=-5`, or
    `(30, -5)`."""
    if places := places_of(answer):
        return places[0].yaw, places[0].pitch
    for pattern in _DIRECTIONS:
        if match := pattern.search(answer[:LONGEST]):
            yaw, pitch = (float(number.replace("−", "-")) for number in match.groups())
            return (wrap(yaw), pitch) if abs(pitch) <= 90 else None
    return None


def in_target(direction: tuple[float, float], yaws: Sequence[float], pitches: Sequence[float]) -> bool:
    """Whether a direction lies in intervals of yaw, which may cross the seam, and of pitch; their ends included."""
    width = yaws[1] - yaws[0]
    width = width if width >= 360 else width % 360
    return (direction[0] - yaws[0]) % 360 <= width and pitches[0] <= direction[1] <= pitches[1]
