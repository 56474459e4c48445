"""Questions about a scene whose answers follow from its geometry, and nothing that is ambiguous.

A question is asked only of what a person with the picture in front can answer: things of which enough is seen, large
enough, and not within a margin of a border between two answers. Among the kinds are the tasks of PanoSpace-Bench by its
published rules (sector margin, bounds of the relations, thresholds of the axes, candidates at distances that differ).
Answers are drawn first and a thing that fits is looked for, so that none of them is more likely than another.

Some kinds have steps, short ones from which the answer follows by looking and plain arithmetic. Their words: `h0` to
`h71` are headings in steps of 5 degrees to the right from the front, `p-18` to `p18` pitches in steps of 5 degrees,
`d1` to `d40` distances in quarters of a metre, `m-20` to `m20` metres along an axis in halves; the truth, rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..options_panorama import check_option_names
from ..places_panorama import SECTORS, BFoV, wrap, write_places
from .cutouts import available
from .scenes import COLOURS, SHAPES, SIZES, Scene, Thing

MARGIN = 8.0  # degrees from a border of sectors, and of the relations below
SEEN = 0.6  # share of a thing that has to be seen for it to be asked about
LARGE_ENOUGH = 6.0  # degrees of what is seen, in both directions
GONE = 0.02  # a thing of which less is seen is not there for anybody
APART = 0.35  # metres by which distances of candidates differ
STEEP = 60.0  # degrees of pitch from which something is overhead or underfoot
HEADINGS = 72  # around; 5 degrees each, less than the margins leave
STEP_WORDS = (
    *(f"h{number}" for number in range(HEADINGS)),
    *(f"p{number}" for number in range(-18, 19)),
    *(f"d{number}" for number in range(1, 41)),
    *(f"m{number}" for number in range(-20, 21)),
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
# How much rarer an answer is found than the others of its kind, in 5,000 scenes.
RARE = {
    "count of shapes": dict(zip(NUMBERS, (1.0, 1.2, 2.1, 4.8, 9.9, 19.9, 16.5), strict=True)),
    "count of colours": dict(zip(NUMBERS, (1.0, 1.2, 2.5, 7.2, 13.8, 19.6, 17.9), strict=True)),
    "facing": {"opposite": 1.3},
    "size": {"medium": 1.5, "large": 1.3},
    "one_or_two_at_seam": {"two": 3.4},
}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: of question.
        words: it is asked in.
        answer: the right one.
        options: of a multiple choice, in the order they are shown.
        places: of the answer, where it is about places.
        turns: what turning the panorama does to the answer: `"same"`, `"direction"`, `"place"`, or `"no"` where the
            question itself would have to change.
        steps: that lead to the answer, in words as the module says; empty for a kind that needs none.
    """

    kind: str
    words: str
    answer: str
    options: tuple[str, ...] = ()
    places: tuple[BFoV, ...] | None = None
    turns: str = "same"
    steps: str = ""

    @property
    def mirrors(self) -> str:
        """What exchanging left and right does: `"same"`, `"direction"` where the words of direction in question and
        answer are exchanged, `"place"`, or `"no"` where more would have to change."""
        return MIRRORS.get(self.kind, "no")

    @property
    def tilts(self) -> str:
        """`"same"` where nothing that is said depends on a level camera, else `"no"`."""
        return "same" if self.kind in LEVEL_OR_NOT else "no"

    @property
    def key(self) -> str | None:
        """Letter of the right option."""
        return "ABCDEFGH"[self.options.index(self.answer)] if self.options else None


@dataclass
class Seen:
    """A scene as questions see it.

    Attributes:
        scene: that was looked at.
        there: things of which anything is seen.
        clear: those that may be asked about.
        random: of the choices.
        steps: whether the answers of tables carry their steps.
    """

    scene: Scene
    random: np.random.Generator
    steps: bool = False
    there: list[Thing] = field(init=False)
    clear: list[Thing] = field(init=False)

    def __post_init__(self) -> None:
        self.there = [thing for thing in self.scene.things if thing.place is not None and thing.seen >= GONE]
        self.clear = [thing for thing in self.there if is_clear(thing)]
        self._described = [(thing, descriptions(thing)) for thing in self.there]
        called = [(thing, self.called(thing)) for thing in self.clear]
        self._named = [(thing, words) for thing, words in called if words is not None]

    def pick(self, values: Sequence[Any]) -> Any:
        """One of some values."""
        return values[int(self.random.integers(len(values)))]

    def answer(self, kind: str, answers: Sequence[str]) -> str:
        """The answer that a question of a kind is to have: rarer ones are wanted more often."""
        weights = np.array([RARE.get(kind, {}).get(answer, 1.0) for answer in answers])
        return answers[int(self.random.choice(len(answers), p=weights / weights.sum()))]

    def shuffled(self, values: Sequence[Any]) -> list[Any]:
        """Some values in another order."""
        return [values[int(place)] for place in self.random.permutation(len(values))]

    def called(self, thing: Thing) -> str | None:
        """The fewest words that fit this thing and nothing else that is there; `None` where there are none."""
        fitting = [words for words in descriptions(thing) if len(self.fitting(words)) == 1]
        return fitting[0] if fitting else None

    def fitting(self, words: str) -> list[Thing]:
        """The things that are there and that some words fit."""
        return [thing for thing, own in self._described if words in own]

    def named(self, things: Sequence[Thing] | None = None) -> list[tuple[Thing, str]]:
        """Clear things, all or some, with words that fit them alone, in a new order."""
        return self.shuffled([each for each in self._named if things is None or any(each[0] is one for one in things)])


def is_clear(thing: Thing) -> bool:
    """Whether enough of a thing is seen for it to be asked about."""
    place = thing.place
    return thing.seen >= SEEN and place is not None and min(_width(place), place.y_fov) >= LARGE_ENOUGH


def _width(place: BFoV) -> float:
    """Degrees that a place is wide on the sphere."""
    return place.x_fov * math.cos(math.radians(place.pitch))


def descriptions(thing: Thing) -> list[str]:
    """The words that fit a thing, the fewest first."""
    if thing.colour is None:
        return [thing.name]
    return [f"{thing.colour} {thing.name}", f"{thing.size} {thing.colour} {thing.name}"]


def sector(yaw: float, margin: float = 0.0) -> str | None:
    """The sector of a yaw; `None` within a margin of two."""
    number = round(yaw / 45)
    return None if abs(wrap(yaw - 45 * number)) > 22.5 - margin else SECTORS[number % 8]


def relation(turn: float, margin: float = MARGIN) -> str | None:
    """Where something is for somebody who faces another thing, by the turn to the right from there to it, degrees:
    PanoSpace-Bench's five relations (bounds 15, 90, 150 and 180 degrees); `None` within a margin of a bound."""
    turn = wrap(turn)
    size = abs(turn)
    if size < 15 + margin or any(abs(size - bound) < margin for bound in (90, 150)):
        return None
    side = "right" if turn > 0 else "left"
    return side if size < 90 else f"back-{side}" if size < 150 else "opposite"


def heading(yaw: float) -> int:
    """A yaw in steps of 5 degrees to the right from the front, 0 to 71."""
    return round(yaw * HEADINGS / 360) % HEADINGS


def difference(to: float, start: float) -> str:
    """The step from two yaws to the turn between them: `h50 - h9 = h41`."""
    a, b = heading(to), heading(start)
    return f"h{a} - h{b} = h{(a - b) % HEADINGS}"


def pitch_word(thing: Thing) -> str:
    """Of its middle."""
    return f"p{round(thing.pitch / 5)}"


def distance_word(thing: Thing) -> str:
    """Of its middle, from the eyes."""
    return f"d{round(thing.distance * 4)}"


def listed(things: Sequence[Thing]) -> str:
    """Things with a running number and where they are: `1 h9 red ball 2 h50 dog`; `0` where there is none."""
    parts = [f"{number} h{heading(thing.yaw)} {full(thing)}" for number, thing in enumerate(things, 1)]
    return " ".join(parts) or "0"


def around(things: Sequence[Thing]) -> list[Thing]:
    """Things by their headings, from the front to the right."""
    return sorted(things, key=lambda thing: (heading(thing.yaw), thing.yaw))


def read_weights(kinds: Sequence[str], known: Sequence[str], what: str) -> dict[str, float]:
    """How often kinds are wanted: of `count`, `grounding:3` and `all:0.5`, which is each that is not named.

    Args:
        kinds: names, each with a weight above 0 behind a colon where it is not 1; none are all.
        known: the kinds there are.
        what: they are, for the messages.

    Raises:
        ValueError: for an unknown kind, one that is named twice, or a weight that is no number above 0.
    """
    weights: dict[str, float] = {}
    for each in kinds or ("all",):
        name, colon, number = each.partition(":")
        check_option_names([name], ("all", *known), what)
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(f"in {each!r} the weight must be a number above 0, such as {name}:2")
        if name in weights:
            raise ValueError(f"{name!r} is named twice in {', '.join(kinds)}: give it a weight, such as {name}:2")
        weights[name] = weight
    if "all" in weights:
        rest = weights.pop("all")
        weights = {name: weights.get(name, rest) for name in known}
    return weights


def in_order(random: np.random.Generator, weights: dict[str, float]) -> list[str]:
    """Kinds in a new order, those of more weight earlier: drawn one after another, without putting back."""
    names = list(weights)
    if len(set(weights.values())) == 1:
        return [names[int(place)] for place in random.permutation(len(names))]
    shares = np.array(list(weights.values()))
    return [
        names[int(place)] for place in random.choice(len(names), len(names), replace=False, p=shares / shares.sum())
    ]


def ask(scene: Scene, count: int, kinds: Sequence[str] = (), steps: bool = False) -> list[Question]:
    """Questions about a scene, of different kinds as far as there are.

    Args:
        scene: that was looked at (`render.look`).
        count: how many, at most.
        kinds: to choose from; all where none is named. With weights (`read_weights`) some come first more often;
            none comes twice before all that can be asked were.
        steps: whether a question is left out from whose rounded steps the answer would not follow.

    Raises:
        ValueError: for an unknown kind, or a wrong weight.
    """
    weights = read_weights(kinds, tuple(KINDS), "the kinds of questions")
    random = np.random.default_rng((scene.seed, 4711))
    seen = Seen(scene, random)
    asked: list[Question] = []
    order = in_order(random, weights)
    for kind in [*order, *order]:
        if len(asked) == count:
            break
        question = KINDS[kind](seen)
        if steps and kind in STEPPED and question is not None and not question.steps:
            continue
        if question is not None and question.words not in [other.words for other in asked]:
            asked.append(question)
    return asked


def article(words: str) -> str:
    """`a` or `an` before words."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


# What is there


def _existence(seen: Seen) -> Question | None:
    """Half of them about what is not there."""
    level = int(seen.random.integers(3))
    pool = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES] if level < 2 else [*available()]
    yes = seen.random.random() < 0.5
    if level == 2 and seen.scene.panorama is not None:  # a real place may have a car or a chair of its own
        return None
    present = [words for words in pool if seen.fitting(words)]
    clear = [words for words in present if any(words in descriptions(thing) for thing in seen.clear)]
    absent = [words for words in pool if words not in present]
    if not clear or not absent:  # asked of neither, or an answer would be more likely
        return None
    words = seen.pick(clear if yes else absent)
    form = seen.pick(("Is there {} around you?", "Can you see {}?", "Does the panorama show {}?"))
    return Question("existence", form.format(article(words)), "yes" if yes else "no")


def _unique(seen: Seen, attribute: str, wanted: Sequence[str]) -> tuple[Thing, str] | None:
    """A solid with a wanted value of an attribute, and words that fit it alone without saying the value."""
    value = seen.answer(attribute, wanted)
    for thing in seen.shuffled([t for t in seen.clear if t.colour and getattr(t, attribute) == value]):
        words = {
            "colour": [thing.name, f"{thing.size} {thing.name}"],
            "name": [f"{thing.colour} solid", f"{thing.size} {thing.colour} solid"],
            "size": [f"{thing.colour} {thing.name}"],
        }[attribute]
        for each in words:
            if [other for other in seen.there if fits(other, each)] == [thing]:
                return thing, each
    return None


def fits(thing: Thing, words: str) -> bool:
    """Whether words fit a thing, `solid` standing for any shape."""
    if thing.colour is None:
        return words == thing.name
    return all(word in (thing.name, thing.colour, thing.size, "solid") for word in words.split())


def _colour(seen: Seen) -> Question | None:
    found = _unique(seen, "colour", list(COLOURS))
    if found is None:
        return None
    thing, words = found
    form = seen.pick(("What colour is the {}?", "Which colour does the {} have?"))
    return Question("colour", form.format(words), str(thing.colour))


def _shape(seen: Seen) -> Question | None:
    found = _unique(seen, "name", SHAPES)
    if found is None:
        return None
    thing, words = found
    return Question("shape", seen.pick(("What shape is the {}?", "Which shape has the {}?")).format(words), thing.name)


def _size(seen: Seen) -> Question | None:
    found = _unique(seen, "size", list(SIZES))
    if found is None or not found[0].stands:
        return None
    thing, words = found
    form = seen.pick(("How large is the {}: small, medium or large?", "Is the {} small, medium or large?"))
    return Question("size", form.format(words), thing.size)


def _count(seen: Seen) -> Question | None:
    """0 to 6; a thing that is hardly seen is in nothing that is counted."""
    level = seen.pick(("shapes", "colours"))
    wanted = seen.answer(f"count of {level}", NUMBERS)
    pool = SHAPES if level == "shapes" else [f"{colour} solid" for colour in COLOURS]
    fitting = []
    for words in pool:
        things = [thing for thing in seen.there if fits(thing, words)]
        if len(things) == NUMBERS.index(wanted) and all(is_clear(thing) for thing in things):
            fitting.append(words)
    if not fitting:
        return None
    form = seen.pick(("How many {} are there?", "Count the {} around you.", "How many {} can you see?"))
    words = seen.pick(fitting)
    steps = listed(around([thing for thing in seen.there if fits(thing, words)]))
    return Question("count", form.format(f"{words}s"), wanted, steps=steps)


# Directions


def _direction(seen: Seen) -> Question | None:
    wanted = seen.answer("direction", SECTORS)
    found = [(t, w) for t, w in seen.named() if abs(t.pitch) < STEEP and sector(t.yaw, MARGIN) == wanted]
    if not found:
        return None
    form = seen.pick(("In which direction is the {}?", "Where is the {}?", "Which way do you look to see the {}?"))
    return Question("direction", form.format(found[0][1]), wanted, turns="direction")


def _what_is_in(seen: Seen) -> Question | None:
    """What is in a direction, where one thing alone is."""
    for wanted in seen.shuffled(SECTORS):
        middle = 45.0 * SECTORS.index(wanted)
        inside = [t for t in seen.there if t.place and abs(wrap(t.yaw - middle)) < 22.5 + MARGIN + t.place.x_fov / 2]
        if len(inside) == 1 and inside[0] in seen.clear and sector(inside[0].yaw, MARGIN) == wanted:
            form = seen.pick(("What was put {}?", "Which thing was put {}?", "Which of the things is {}?"))
            place = {"front": "in front", "back": "behind you"}.get(wanted, f"at the {wanted}")
            return Question("what_is_in_direction", form.format(place), full(inside[0]), turns="no")
    return None


def full(thing: Thing) -> str:
    """A thing as answers name it."""
    return f"{thing.colour} {thing.name}" if thing.colour else thing.name


def _order(seen: Seen) -> Question | None:
    """Of two things, which comes first on a turn to the right that starts at a third."""
    named = seen.named([thing for thing in seen.clear if abs(thing.pitch) < STEEP])[:3]
    if len(named) < 3:
        return None
    (start, a), (first, b), (second, c) = named
    turns = [(other.yaw - start.yaw) % 360 for other in (first, second)]
    if min(*turns, 360 - max(turns), abs(turns[0] - turns[1])) < MARGIN + 4:
        return None
    words = f"You face the {a} and turn to the right. What comes first, the {b} or the {c}?"
    steps = f"{difference(first.yaw, start.yaw)} , {difference(second.yaw, start.yaw)}"
    return Question("order", words, b if turns[0] < turns[1] else c, steps=steps)


def _turned(seen: Seen) -> Question | None:
    """Where something is after the observer has turned."""
    wanted = seen.answer("after_turning", SECTORS)
    degrees, side = seen.pick((90, 135, 180)), seen.pick(("right", "left"))
    turn = degrees if side == "right" else -degrees
    for thing, words in seen.named([thing for thing in seen.clear if abs(thing.pitch) < STEEP]):
        if sector(wrap(thing.yaw - turn), MARGIN) == wanted:
            asked = f"You turn {side} by {degrees} degrees." if degrees < 180 else "You turn around, by 180 degrees."
            steps = difference(thing.yaw, turn)
            return Question("after_turning", f"{asked} Where is the {words} now?", wanted, (), None, "direction", steps)
    return None


def _facing(seen: Seen) -> Question | None:
    """Where one thing is when another is faced, in PanoSpace-Bench's five relations."""
    wanted = seen.answer("facing", ("right", "back-right", "opposite", "back-left", "left"))
    named = seen.named([thing for thing in seen.clear if abs(thing.pitch) < STEEP])
    for a, faced in named:
        for b, other in named:
            if a is not b and relation(b.yaw - a.yaw) == wanted:
                words = f"You face the {faced}. Is the {other} right, back-right, opposite, back-left or left of that?"
                return Question("facing", words, wanted, steps=difference(b.yaw, a.yaw))
    return None


# Distances and heights


def _nearest(seen: Seen) -> Question | None:
    """Of four whose distances differ."""
    named = seen.named()[:4]
    if len(named) < 4:
        return None
    distances = sorted(thing.distance for thing, _ in named)
    if min(b - a for a, b in zip(distances, distances[1:], strict=False)) < APART:
        return None
    nearest = min(named, key=lambda each: each[0].distance)[1]
    form = seen.pick(("Which of these is nearest to you?", "What is closest to you?"))
    steps = " , ".join(f"{letter} {distance_word(thing)}" for letter, (thing, _) in zip("ABCD", named, strict=True))
    return Question("nearest_of_four", form, nearest, tuple(words for _, words in named), steps=steps)


def _alike(seen: Seen) -> tuple[tuple[Thing, str], tuple[Thing, str]] | None:
    """Two things of one size, both solids or both cut-outs: of others, their names say which is likely to be higher."""
    named = seen.named()
    for place, (a, first) in enumerate(named):
        for b, second in named[place + 1 :]:
            if a.size == b.size and (a.colour is None) == (b.colour is None):
                return (a, first), (b, second)
    return None


def _higher(seen: Seen) -> Question | None:
    pair = _alike(seen)
    if pair is None or abs(pair[0][0].pitch - pair[1][0].pitch) < MARGIN + 4:
        return None
    (a, first), (b, second) = pair
    words = f"Does the {first} appear higher or lower than the {second}?"
    steps = f"{pitch_word(a)} , {pitch_word(b)}"
    return Question("higher_or_lower", words, "higher" if a.pitch > b.pitch else "lower", steps=steps)


def _relation_3d(seen: Seen) -> Question | None:
    """Along one axis of the observer who faces the front, by PanoSpace-Bench's thresholds."""
    pair = _alike(seen)
    if pair is None:
        return None
    (a, first), (b, second) = pair
    axis = int(seen.random.integers(3))
    reach = a.radius + b.radius
    threshold = (max(0.35, reach), max(0.25, reach), 0.6)[axis]
    apart = a.position[axis] - b.position[axis]
    if abs(apart) < threshold or (axis == 1 and apart * (a.pitch - b.pitch) <= 0):
        return None  # nor is a height asked that only distances give away
    positive, negative = (("right", "left"), ("above", "below"), ("ahead", "behind"))[axis]
    words = (
        f"If you face the front, is the {first} further to the right or to the left than the {second}, in metres?",
        f"Is the {first} above or below the {second}, in metres above the floor?",
        f"If you face the front, does the {first} lie ahead of the {second} or behind it, in metres?",
    )[axis]
    steps = " , ".join(
        f"h{heading(thing.yaw)} {pitch_word(thing)} {distance_word(thing)} m{round(2 * thing.position[axis])}"
        for thing in (a, b)
    )
    answer, turns = positive if apart > 0 else negative, "same" if axis == 1 else "no"
    return Question("relation_3d", words, answer, (), None, turns, steps)


# The seam and the poles


def _across_seam(seen: Seen) -> Question | None:
    """Which thing is next to another one across the edge of the picture."""
    named = seen.named([thing for thing in seen.clear if abs(thing.pitch) < 45 and not _crosses(thing)])
    left = [each for each in named if -180 <= each[0].yaw < -120]
    right = [each for each in named if 120 < each[0].yaw < 180]
    if not left or not right:
        return None
    a, b = (max(side, key=lambda each: abs(each[0].yaw)) for side in (right, left))
    turn = (b[0].yaw - a[0].yaw) % 360
    after = [(thing.yaw - a[0].yaw) % 360 - turn for thing in seen.there if thing not in (a[0], b[0])]
    others = [each for each in named if each[0] not in (a[0], b[0])]
    if min(after, default=360) < MARGIN or len(others) < 2:
        return None
    offered = seen.shuffled([b, *others[:3]])
    options = tuple(words for _, words in offered)
    where = [heading(thing.yaw) for thing, _ in offered]
    behind = [number for number in where if number >= HEADINGS // 2]
    follows = min(behind) == heading(b[0].yaw) and behind.count(min(behind)) == 1
    steps = " , ".join(f"{letter} h{number}" for letter, number in zip("ABCD", where, strict=False)) if follows else ""
    words = f"The left and the right edge of the picture meet behind you. What is next to the {a[1]} across that edge?"
    return Question("adjacent_across_seam", words, b[1], options, None, "no", steps)


def _crosses(thing: Thing) -> bool:
    return thing.place is not None and abs(wrap(thing.place.yaw + 180)) < thing.place.x_fov / 2


def _one_or_two(seen: Seen) -> Question | None:
    """Whether what is seen at both edges is one thing or two."""
    wanted = seen.answer("one_or_two_at_seam", ("one", "two"))
    at_edge = [t for t in seen.there if t.place and abs(wrap(t.place.yaw + 180)) < t.place.x_fov / 2 + 20]
    if not all(is_clear(thing) and abs(thing.pitch) < 45 for thing in at_edge):
        return None
    is_one = len(at_edge) == 1 and _crosses(at_edge[0])
    is_two = len(at_edge) == 2 and not any(map(_crosses, at_edge)) and at_edge[0].yaw * at_edge[1].yaw < 0
    if (wanted == "one" and not is_one) or (wanted == "two" and not is_two):
        return None
    words = (
        "Something is at the left edge of the picture and something at the right edge. Is that one thing or two?",
        "The picture is cut open behind you. Are the things at its two edges one thing or two?",
    )
    return Question("one_or_two_at_seam", seen.pick(words), wanted, turns="no", steps=listed(around(at_edge)))


def _at_pole(seen: Seen) -> Question | None:
    up = seen.random.random() < 0.5
    wanted = seen.answer("shape_at_pole", SHAPES)
    steep = [t for t in seen.there if t.colour and (t.pitch if up else -t.pitch) >= STEEP - 10]
    if [thing.name for thing in steep] != [wanted] or not is_clear(steep[0]) or abs(steep[0].pitch) < STEEP:
        return None
    words = seen.pick(("What shape is the solid {}?", "Which shape is {}?")).format(
        seen.pick(("overhead", "above you")) if up else seen.pick(("underfoot", "below you"))
    )
    return Question("shape_at_pole", words, steep[0].name)


# Places


def _ground(seen: Seen) -> Question | None:
    """A thing -> its place."""
    named = seen.named()
    if not named:
        return None
    thing, words = named[0]
    assert thing.place is not None
    form = seen.pick(
        (
            "Where exactly is the {}? Answer with [yaw, pitch, x_fov, y_fov] in degrees.",
            "Give the bounding field of view of the {} as [yaw, pitch, x_fov, y_fov] in degrees.",
        )
    )
    return Question("grounding", form.format(words), write_places([thing.place]), (), (thing.place,), "place")


def _at_place(seen: Seen) -> Question | None:
    """A place -> what is there."""
    for thing in seen.shuffled(seen.clear):
        assert thing.place is not None
        words = f"What is at {write_places([thing.place])}? (yaw, pitch, x_fov, y_fov in degrees)"
        return Question("what_is_at_place", words, full(thing), turns="no")
    return None


def _ground_all(seen: Seen) -> Question | None:
    """A description -> all places that it fits, none where there is none."""
    level = int(seen.random.integers(2))
    pool = [[f"{colour} solid" for colour in COLOURS], list(SHAPES)][level]
    words = seen.pick(pool)
    things = [thing for thing in seen.there if fits(thing, words)]
    if not all(is_clear(thing) for thing in things):
        return None
    if not things and seen.random.random() < 0.7:
        return None
    things.sort(key=lambda thing: thing.yaw)
    places = [thing.place for thing in things if thing.place is not None]
    asked = f"List the places of all {words}s from left to right as [yaw, pitch, x_fov, y_fov] in degrees, [] if none."
    answer = "[" + ", ".join(write_places([place]) for place in places) + "]"
    return Question("grounding_all", asked, answer, (), tuple(places), "place", listed(things))


# Captions


def _caption(seen: Seen) -> Question | None:
    """Everything around, in order, from the front to the right."""
    things = [thing for thing in seen.there if abs(thing.pitch) < STEEP]
    if len(things) < 2 or not all(is_clear(thing) and sector(thing.yaw, 2.0) for thing in things):
        return None
    things.sort(key=lambda thing: (thing.yaw + 22.5) % 360)
    parts = [f"{sector(thing.yaw)}: {full(thing)}" for thing in things]
    form = seen.pick(
        ("Describe what was put around you, from the front to the right.", "Name what was put around you.")
    )
    return Question("caption_around", form, "; ".join(parts) + ".", turns="no", steps=listed(things))


def _caption_direction(seen: Seen) -> Question | None:
    """What is in one half, from left to right."""
    name, middle = seen.pick(
        (("in front", 0.0), ("to the right", 90.0), ("at the back", 180.0), ("to the left", -90.0))
    )
    turns = [(wrap(thing.yaw - middle), thing) for thing in seen.there if abs(thing.pitch) < STEEP]
    inside = sorted([each for each in turns if abs(each[0]) < 45], key=lambda each: each[0])
    near = [thing for turn, thing in turns if thing.place and abs(abs(turn) - 45) < MARGIN / 2 + thing.place.x_fov / 2]
    if not inside or near or not all(is_clear(thing) for _, thing in inside):
        return None
    if any(b[0] - a[0] < 3 for a, b in zip(inside, inside[1:], strict=False)):
        return None
    answer = ", ".join(full(thing) for _, thing in inside) + "."
    steps = listed([thing for _, thing in inside])
    return Question(
        "caption_direction", f"What was put {name} of you, from left to right?", answer, turns="no", steps=steps
    )


KINDS: dict[str, Callable[[Seen], Question | None]] = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "direction": _direction,
    "what_is_in_direction": _what_is_in,
    "order": _order,
    "after_turning": _turned,
    "facing": _facing,
    "nearest_of_four": _nearest,
    "higher_or_lower": _higher,
    "relation_3d": _relation_3d,
    "adjacent_across_seam": _across_seam,
    "one_or_two_at_seam": _one_or_two,
    "shape_at_pole": _at_pole,
    "grounding": _ground,
    "what_is_at_place": _at_place,
    "grounding_all": _ground_all,
    "caption_around": _caption,
    "caption_direction": _caption_direction,
}
# Kinds with few answers, of which a reader of the questions alone must not know more than chance.
CLOSED = (
    *("existence", "colour", "shape", "size", "count", "direction", "order", "after_turning", "facing"),
    *(
        "nearest_of_four",
        "higher_or_lower",
        "relation_3d",
        "adjacent_across_seam",
        "one_or_two_at_seam",
        "shape_at_pole",
    ),
)
# Kinds whose questions have steps. Of `adjacent_across_seam` they are the headings of the options, of which the first
# from behind on (`h36`) is next to what is on the other side of the edge.
STEPPED = (
    *("count", "order", "after_turning", "facing", "nearest_of_four", "higher_or_lower", "relation_3d"),
    *("adjacent_across_seam", "one_or_two_at_seam", "grounding_all", "caption_around", "caption_direction"),
)
# Kinds that a tilted camera does not change: what is there and what it is like, nothing of directions or horizons.
LEVEL_OR_NOT = ("existence", "colour", "shape", "size", "count", "nearest_of_four")
# What exchanging left and right does to a kind, as `Question.mirrors` says it. Not named: the order of a caption and a
# place in the words of a question would have to change.
MIRRORS = {
    **dict.fromkeys((*LEVEL_OR_NOT, "higher_or_lower", "shape_at_pole"), "same"),
    **dict.fromkeys(("adjacent_across_seam", "one_or_two_at_seam"), "same"),  # of both edges alike
    **dict.fromkeys(("direction", "what_is_in_direction", "order", "after_turning", "facing"), "direction"),
    "relation_3d": "direction",
    **dict.fromkeys(("grounding", "grounding_all"), "place"),
}
