"""Dense conversations about a whole scene: a table asks the same of many things in a row, or of many pairs.

The first turn of the user says what is asked for, then each has one entry and each answer is a few words: what is given
is the user's, so that only what is to be known is the assistant's. Entries are as unambiguous as `questions`: by the
same margins, of the same clear things, in words that fit one thing alone; the others are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from ..places_panorama import wrap, write_places
from .cutouts import available
from .questions import (
    APART,
    HEADINGS,
    MARGIN,
    NUMBERS,
    RARE,
    SECTORS,
    STEEP,
    Seen,
    around,
    article,
    difference,
    distance_word,
    fits,
    full,
    heading,
    in_order,
    is_clear,
    listed,
    pitch_word,
    read_weights,
    relation,
    sector,
)
from .scenes import COLOURS, SHAPES, SIZES, Scene, Thing

Table = list[tuple[str, str]]
MOST = 10  # entries of a table
LEAST = 2
RARELY = {"arithmetic": 0.2}  # of the kinds, where no weights are given
_DEGREES = "[yaw, pitch, x_fov, y_fov] in degrees"


def tables(scene: Scene, count: int, kinds: Sequence[str] = (), steps: bool = False) -> list[Table]:
    """Some of the tables that a scene allows, each of another kind.

    Args:
        scene: that was looked at (`render.look`).
        count: how many, at most.
        kinds: to choose from, with weights or without (`questions.read_weights`); all where none is named, arithmetic
            more rarely.
        steps: whether answers that need steps (count, order, facing, after_turning) carry them,
            `<think>STEPS</think>ANSWER`.

    Returns:
        Of each table its turns: what the user says, and what the assistant answers.

    Raises:
        ValueError: for an unknown kind, or a wrong weight.
    """
    weights = read_weights(kinds, tuple(TABLES), "the kinds of tables")
    if not kinds:
        weights |= RARELY
    seen = Seen(scene, np.random.default_rng((scene.seed, 4712)), steps)
    drawn = (TABLES[kind](seen) for kind in in_order(seen.random, weights))
    found = (table for table in drawn if table is not None)
    return [table for _, table in zip(range(count), found, strict=False)]


def _table(seen: Seen, forms: Sequence[str], entries: Sequence[tuple[str, str]]) -> Table | None:
    """Some entries in a new order, what is asked for before the first; nothing where there are too few."""
    if len(entries) < LEAST:
        return None
    (words, answer), *others = seen.shuffled(entries)[:MOST]
    return [(f"{seen.pick(forms)} {words}", answer), *others]


def _with_steps(seen: Seen, steps: str, answer: str) -> str:
    return f"<think>{steps}</think>{answer}" if seen.steps else answer


def _level(seen: Seen) -> list[tuple[Thing, str]]:
    """Things that have a heading, with their names."""
    return [each for each in seen.named() if abs(each[0].pitch) < STEEP]


# One thing an entry


def _existence(seen: Seen) -> Table | None:
    """A fair coin an entry; what is absent shares its colour or its shape with what is there."""
    if seen.random.random() < 0.7 or seen.scene.panorama is not None:
        pool = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    else:
        pool = [*available()]
    present = [words for words in pool if seen.fitting(words)]
    there = {word for words in present for word in words.split()}
    clear = {words for words in present if any(thing in seen.clear for thing in seen.fitting(words))}
    near = [words for words in pool if words not in present and (" " not in words or there & set(words.split()))]
    left = {"yes": seen.shuffled([words for words in present if words in clear]), "no": seen.shuffled(near)}
    entries: list[tuple[str, str]] = []
    while len(entries) < MOST and all(left.values()):  # where one is used up the coin would not be fair
        answer = seen.pick(("yes", "no"))
        entries.append((f"{article(left[answer].pop())}?".capitalize(), answer))
    forms = ("Are these around you? Answer yes or no.", "Which of these can you see? Say yes or no to each.")
    return _table(seen, forms, entries)


def _attribute(seen: Seen, attribute: str, forms: Sequence[str]) -> Table | None:
    """An attribute of solids whose other words fit them alone."""
    entries = []
    for thing in seen.clear:
        if thing.colour is None or (attribute == "size" and not thing.stands):
            continue
        words = {
            "colour": [thing.name, f"{thing.size} {thing.name}"],
            "name": [f"{thing.colour} solid", f"{thing.size} {thing.colour} solid"],
            "size": [f"{thing.colour} {thing.name}"],
        }[attribute]
        alone = [each for each in words if [other for other in seen.there if fits(other, each)] == [thing]]
        if alone:
            entries.append((f"The {seen.pick(alone)}?", str(getattr(thing, attribute))))
    return _table(seen, forms, entries)


def _colour(seen: Seen) -> Table | None:
    return _attribute(seen, "colour", ("What colour are these?", "Which colour does each of these have?"))


def _shape(seen: Seen) -> Table | None:
    return _attribute(seen, "name", ("What shape are these?", f"Which shape has each of these: {', '.join(SHAPES)}?"))


def _size(seen: Seen) -> Table | None:
    return _attribute(seen, "size", ("How large are these?", f"Say of each whether it is {', '.join(SIZES)}."))


def _count(seen: Seen) -> Table | None:
    """Of all shapes and colours those that can be counted without doubt; rarer numbers are wanted more often."""
    entries, weights = [], []
    for level, pool in (("shapes", SHAPES), ("colours", [f"{colour} solid" for colour in COLOURS])):
        for words in pool:
            things = [thing for thing in seen.there if fits(thing, words)]
            if len(things) < len(NUMBERS) and all(map(is_clear, things)):
                answer = _with_steps(seen, listed(around(things)), NUMBERS[len(things)])
                entries.append((f"{words}s?".capitalize(), answer))
                weights.append(RARE[f"count of {level}"][NUMBERS[len(things)]])
    forms = ("How many of these are there?", "Count these. Answer with a number each.")
    if not entries:
        return None
    shares = np.array(weights) / sum(weights)
    some = seen.random.choice(len(entries), min(MOST, len(entries)), replace=False, p=shares)
    return _table(seen, forms, [entries[int(place)] for place in some])


def _direction(seen: Seen) -> Table | None:
    found = [(f"The {words}?", sector(thing.yaw, MARGIN)) for thing, words in _level(seen)]
    forms = ("Where are these? Answer with a direction each.", "In which direction is each of these?")
    return _table(seen, forms, [(words, where) for words, where in found if where])


def _what_is_in(seen: Seen) -> Table | None:
    """Of the eight directions those where nothing is, or what is there from left to right, none of it near a border."""
    entries = []
    for middle, name in zip(range(0, 360, 45), SECTORS, strict=True):
        turns = [(wrap(thing.yaw - middle), thing) for thing in seen.there]
        inside = [
            (turn, thing)
            for turn, thing in sorted(turns, key=lambda each: each[0])
            if thing.place
            and min(abs(turn), abs(wrap(thing.place.yaw - middle))) < 22.5 + MARGIN + thing.place.x_fov / 2
        ]
        if any(not is_clear(thing) or sector(thing.yaw, MARGIN) != name for _, thing in inside):
            continue
        if any(b[0] - a[0] < 3 for a, b in zip(inside, inside[1:], strict=False)):
            continue
        words = {"front": "In front?", "back": "Behind you?"}.get(name, f"At the {name}?")
        entries.append((words, ", ".join(full(thing) for _, thing in inside) or "nothing"))
    forms = (
        "What was put where? Answer nothing where nothing is.",
        "Say of each direction what was put there, if anything.",
    )
    return _table(seen, forms, entries)


def _grounding(seen: Seen) -> Table | None:
    entries = [(f"The {words}?", write_places([thing.place])) for thing, words in seen.named() if thing.place]
    forms = (
        f"Where exactly are these? Answer with {_DEGREES} each.",
        f"Give the bounding field of view of each as {_DEGREES}.",
    )
    return _table(seen, forms, entries)


def _at_place(seen: Seen) -> Table | None:
    entries = [(f"{write_places([thing.place])}?", full(thing)) for thing in seen.clear if thing.place]
    forms = (f"What is at these places? They are {_DEGREES}.", f"Say what each place shows. It is {_DEGREES}.")
    return _table(seen, forms, entries)


def _heading(seen: Seen) -> Table | None:
    entries = [(f"The {words}?", f"h{heading(thing.yaw)}") for thing, words in _level(seen)]
    forms = (
        "What are the headings of these? h0 is the front, then 5 degrees each to the right.",
        f"Give the heading of each, h0 to h{HEADINGS - 1}, to the right from the front.",
    )
    return _table(seen, forms, entries)


def _pitch(seen: Seen) -> Table | None:
    entries = [(f"The {words}?", pitch_word(thing)) for thing, words in seen.named()]
    forms = (
        "How far up or down are these? p0 is the horizon, then 5 degrees each.",
        "Give the pitch of each, p-18 to p18, up from the horizon.",
    )
    return _table(seen, forms, entries)


def _distance(seen: Seen) -> Table | None:
    entries = [(f"The {words}?", distance_word(thing)) for thing, words in seen.named()]
    forms = ("How far away are these? d4 is a metre.", "Give the distance of each, d1 to d40, in quarters of a metre.")
    return _table(seen, forms, entries)


# A pair an entry


def _nearer(seen: Seen) -> Table | None:
    entries = [
        (f"The {first} or the {second}?", first if a.distance < b.distance else second)
        for (a, first), (b, second) in combinations(seen.named(), 2)
        if abs(a.distance - b.distance) >= APART
    ]
    return _table(seen, ("Which of two is nearer to you?", "What is closer to you each time?"), entries)


def _higher(seen: Seen) -> Table | None:
    entries = [
        (f"The {first}, the {second}?", "higher" if a.pitch > b.pitch else "lower")
        for (a, first), (b, second) in combinations(seen.named(), 2)
        if a.size == b.size and (a.colour is None) == (b.colour is None) and abs(a.pitch - b.pitch) >= MARGIN + 4
    ]
    forms = ("Does the first appear higher or lower than the second?", "Higher or lower?")
    return _table(seen, forms, entries)


def _facing(seen: Seen) -> Table | None:
    """Where things are for who faces another one, the same throughout or another each time."""
    level = _level(seen)
    one = bool(level) and seen.random.random() < 0.5
    pairs = [(level[0], other) for other in level[1:]] if one else list(combinations(level, 2))
    found = [
        (faced, other, _with_steps(seen, difference(b.yaw, a.yaw), where))
        for (a, faced), (b, other) in pairs
        if (where := relation(b.yaw - a.yaw)) is not None
    ]
    among = "right, back-right, opposite, back-left or left"
    if one:
        same = level[0][1]
        forms = (f"You face the {same}. Where are these: {among}?", f"Facing the {same}, is each {among} of that?")
        return _table(seen, forms, [(f"The {other}?", where) for _, other, where in found])
    forms = (f"Facing one thing, is another {among} of that?", f"Where is what, seen from who faces a thing: {among}?")
    return _table(seen, forms, [(f"Facing the {faced}, the {other}?", where) for faced, other, where in found])


def _order(seen: Seen) -> Table | None:
    """Which of two comes first on a turn to the right that starts at a third, the same throughout."""
    level = _level(seen)
    if len(level) < 3:
        return None
    (start, faced), *others = level
    entries = []
    for (a, first), (b, second) in combinations(others, 2):
        turns = [(thing.yaw - start.yaw) % 360 for thing in (a, b)]
        if min(*turns, 360 - max(turns), abs(turns[0] - turns[1])) >= MARGIN + 4:
            steps = f"{difference(a.yaw, start.yaw)} , {difference(b.yaw, start.yaw)}"
            answer = first if turns[0] < turns[1] else second
            entries.append((f"The {first} or the {second}?", _with_steps(seen, steps, answer)))
    forms = (
        f"You face the {faced} and turn to the right. What comes first?",
        f"Turning to the right from the {faced}, what do you see first?",
    )
    return _table(seen, forms, entries)


def _turned(seen: Seen) -> Table | None:
    degrees, side = seen.pick((90, 135, 180)), seen.pick(("right", "left"))
    turn = degrees if side == "right" else -degrees
    entries = [
        (f"The {words}?", _with_steps(seen, difference(thing.yaw, turn), where))
        for thing, words in _level(seen)
        if (where := sector(wrap(thing.yaw - turn), MARGIN)) is not None
    ]
    asked = f"You turn {side} by {degrees} degrees." if degrees < 180 else "You turn around, by 180 degrees."
    return _table(seen, (f"{asked} Where are these now?", f"{asked} In which direction is each now?"), entries)


# Without the picture


def _arithmetic(seen: Seen) -> Table | None:
    """Turns between headings."""
    pairs = seen.random.integers(0, HEADINGS, (MOST, 2)).tolist()
    entries = [(f"h{a} - h{b}?", f"h{(a - b) % HEADINGS}") for a, b in pairs]
    return _table(
        seen, (f"Subtract headings; a turn has {HEADINGS}.", "What is the turn between two headings?"), entries
    )


TABLES: dict[str, Callable[[Seen], Table | None]] = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "direction": _direction,
    "what_is_in_direction": _what_is_in,
    "heading": _heading,
    "pitch": _pitch,
    "distance": _distance,
    "grounding": _grounding,
    "what_is_at_place": _at_place,
    "nearer": _nearer,
    "higher_or_lower": _higher,
    "facing": _facing,
    "order": _order,
    "after_turning": _turned,
    "arithmetic": _arithmetic,
}
