"""Tables and steps of the synthetic world, worked out again from what the scene is made of."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from panorama_vlm.places_panorama import bfov_iou, read_places
from panorama_vlm.processing_panorama import split_steps
from panorama_vlm.synthetic.questions import KINDS, STEP_WORDS, STEPPED, Seen, ask, read_weights
from panorama_vlm.synthetic.tables import MOST, TABLES, tables
from panorama_vlm.synthetic.write import World, parse_world

SECTORS = ["front", "front-right", "right", "back-right", "back", "back-left", "left", "front-left"]
COUNTED = ["zero", "one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="module")
def scenes():
    world = World(seed=11, width=128)
    return [world.scene(number) for number in range(60)]


def seen_things(scene):
    return [thing for thing in scene.things if thing.place is not None and thing.seen >= 0.02]


def matching(scene, words):
    """Things that all words fit: a name, a colour, a size, `solid`; a plural is read as its singular."""
    found = []
    for thing in seen_things(scene):
        own = {thing.name, thing.size, thing.colour, "solid"} if thing.colour else {thing.name}
        if set(words.split()) <= own or words == thing.name:
            found.append(thing)
    return found


def one(scene, words):
    (thing,) = matching(scene, re.sub(r"^(the|a|an) ", "", words.strip().lower()))
    return thing


def right_turn(a, b):
    """Degrees to the right from one heading to another, in [0, 360)."""
    return (b - a) % 360


def five(yaw):
    return math.floor((yaw % 360) / 5 + 0.5) % 72


def check_place(scene, words, answer):
    (found,) = read_places(answer)
    assert bfov_iou(found.place, one(scene, words).place) > 0.6


def check_count(scene, words, answer):
    assert COUNTED[len(matching(scene, words.lower().removesuffix("s")))] == answer


def check_attribute(name):
    def check(scene, words, answer):
        assert str(getattr(one(scene, words), name)) == answer

    return check


def check_existence(scene, words, answer):
    named = re.sub(r"^(a|an) ", "", words.lower())
    assert (answer == "yes") == bool(matching(scene, named))


def check_nearer(scene, words, answer):
    first, second = words.lower().split(" or ")
    nearer = min((one(scene, first).distance, first), (one(scene, second).distance, second))[1]
    assert nearer.strip() == f"the {answer}"


def check_higher(scene, words, answer):
    first, second = (one(scene, each) for each in words.lower().split(", "))
    assert answer == (
        "higher" if first.position[1] / first.distance > second.position[1] / second.distance else "lower"
    )


def check_what_is_in(scene, words, answer):
    middle = {"in front": 0, "behind you": 180}.get(words.lower())
    if middle is None:
        middle = 45 * SECTORS.index(words.lower().removeprefix("at the "))
    inside = [thing for thing in seen_things(scene) if abs((thing.yaw - middle + 180) % 360 - 180) < 22.5]
    inside.sort(key=lambda thing: (thing.yaw - middle + 180) % 360)
    names = [f"{thing.colour} {thing.name}" if thing.colour else thing.name for thing in inside]
    assert answer == (", ".join(names) or "nothing")


def check_at_place(scene, words, answer):
    (asked,) = read_places(words)
    best = max(seen_things(scene), key=lambda thing: bfov_iou(thing.place, asked.place))
    assert answer == (f"{best.colour} {best.name}" if best.colour else best.name)


CHECKS = {
    "existence": check_existence,
    "colour": check_attribute("colour"),
    "shape": check_attribute("name"),
    "size": check_attribute("size"),
    "count": check_count,
    "direction": lambda scene, words, answer: _same(SECTORS[round(one(scene, words).yaw / 45) % 8], answer),
    "what_is_in_direction": check_what_is_in,
    "heading": lambda scene, words, answer: _same(f"h{five(one(scene, words).yaw)}", answer),
    "pitch": lambda scene, words, answer: _near(5 * int(answer[1:]), one(scene, words).pitch, 2.51),
    "distance": lambda scene, words, answer: _near(int(answer[1:]) / 4, one(scene, words).distance, 0.126),
    "grounding": check_place,
    "what_is_at_place": check_at_place,
    "nearer": check_nearer,
    "higher_or_lower": check_higher,
}


def _same(expected, found):
    assert expected == found


def _near(expected, found, tolerance):
    assert abs(expected - found) <= tolerance


def entries_of(table):
    """(instruction, words of the entry without the question mark, answer)."""
    instruction, words = re.fullmatch(r"(.*[.?:]) (.+?)\?", table[0][0], re.DOTALL).groups()
    return instruction, [(words, table[0][1]), *((asked.removesuffix("?"), answer) for asked, answer in table[1:])]


@pytest.mark.parametrize("kind", CHECKS)
def test_entries_are_right(scenes, kind):
    checked = 0
    for scene in scenes:
        table = TABLES[kind](Seen(scene, np.random.default_rng(scene.seed)))
        if table is None:
            continue
        assert 2 <= len(table) <= MOST
        for words, answer in entries_of(table)[1]:
            CHECKS[kind](scene, words, answer)
            checked += 1
    assert checked > 30


def relation_of(turn):
    turn = (turn + 180) % 360 - 180
    side = "right" if turn > 0 else "left"
    return side if abs(turn) < 90 else f"back-{side}" if abs(turn) < 150 else "opposite"


def subtractions(steps):
    """Every `hA - hB = hC` of some steps, each of which has to be right."""
    found = [tuple(map(int, each)) for each in re.findall(r"h(\d+) - h(\d+) = h(\d+)", steps)]
    for a, b, c in found:
        assert (a - b) % 72 == c
    return found


def test_entries_about_pairs_are_right_and_follow_from_their_steps(scenes):
    checked = dict.fromkeys(("facing", "order", "after_turning"), 0)
    for scene in scenes:
        for kind in checked:
            table = TABLES[kind](Seen(scene, np.random.default_rng(scene.seed), steps=True))
            if table is None:
                continue
            instruction, entries = entries_of(table)
            for words, said in entries:
                answer, steps = split_steps(said)
                numbers = subtractions(steps)
                if kind == "facing":
                    each = re.match(r"Facing (.+), (.+)", words)
                    fixed = re.search(r"(?:You face|Facing) (the .+?)[.,]", instruction)
                    faced, other = each.groups() if each else (fixed[1], words)
                    a, b = one(scene, faced), one(scene, other)
                    assert answer == relation_of(b.yaw - a.yaw) == relation_of(5 * numbers[0][2])
                    assert numbers[0][:2] == (five(b.yaw), five(a.yaw))
                elif kind == "order":
                    start = one(scene, re.search(r"(?:You face|from) (the .+?)(?: and|,)", instruction)[1])
                    things = [one(scene, each) for each in words.split(" or ")]
                    turns = [right_turn(start.yaw, thing.yaw) for thing in things]
                    assert one(scene, answer) is things[int(np.argmin(turns))]
                    assert numbers[0][2] != numbers[1][2] and (turns[0] < turns[1]) == (numbers[0][2] < numbers[1][2])
                else:
                    degrees = int(re.search(r"(\d+) degrees", instruction)[1])
                    heading = -degrees if " left " in instruction else degrees
                    yaw = one(scene, words).yaw - heading
                    assert answer == SECTORS[round(yaw / 45) % 8] == SECTORS[round(numbers[0][2] * 5 / 45) % 8]
                checked[kind] += 1
    assert min(checked.values()) > 50


def test_counts_follow_from_the_things_that_their_steps_list(scenes):
    checked = 0
    for scene in scenes:
        table = TABLES["count"](Seen(scene, np.random.default_rng(scene.seed), steps=True))
        for words, said in entries_of(table)[1] if table else ():
            answer, steps = split_steps(said)
            things = sorted(matching(scene, words.lower().removesuffix("s")), key=lambda t: (five(t.yaw), t.yaw % 360))
            expected = [(str(i), str(five(t.yaw)), f"{t.colour} {t.name}") for i, t in enumerate(things, 1)]
            assert re.findall(r"(\d+) h(\d+) (\w+ \w+)", steps) == expected
            assert COUNTED[len(things)] == answer and (things or steps == "0")
            checked += 1
    assert checked > 50


def test_arithmetic_needs_no_picture(scenes):
    for scene in scenes[:5]:
        _, entries = entries_of(TABLES["arithmetic"](Seen(scene, np.random.default_rng(0))))
        for words, answer in entries:
            a, b = map(int, re.fullmatch(r"h(\d+) - h(\d+)", words).groups())
            assert answer == f"h{(a - b) % 72}"


def test_answers_of_questions_follow_from_their_steps(scenes):
    found = dict.fromkeys(STEPPED, 0)
    for scene in scenes:
        for question in ask(scene, 21, steps=True):
            if question.kind not in STEPPED:
                assert not question.steps
                continue
            found[question.kind] += 1
            numbers = subtractions(question.steps)
            if question.kind == "facing":
                assert relation_of(5 * numbers[0][2]) == question.answer
            elif question.kind == "order":
                first, second = re.search(r"first, the (.+) or the (.+)\?", question.words).groups()
                assert question.answer == (first if numbers[0][2] < numbers[1][2] else second)
            elif question.kind == "after_turning":
                assert SECTORS[round(numbers[0][2] * 5 / 45) % 8] == question.answer
            elif question.kind == "nearest_of_four":
                distances = {letter: int(d) for letter, d in re.findall(r"([A-D]) d(\d+)", question.steps)}
                assert min(distances, key=distances.get) == question.key
            elif question.kind == "higher_or_lower":
                first, second = map(int, re.findall(r"p(-?\d+)", question.steps))
                assert question.answer == ("higher" if first > second else "lower")
            elif question.kind in ("count", "one_or_two_at_seam"):
                listed = re.findall(r"(\d+) h\d+", question.steps)
                assert [int(number) for number in listed] == [*range(1, len(listed) + 1)]
                assert COUNTED[len(listed)] == question.answer
            elif question.kind == "adjacent_across_seam":
                behind = {letter: int(h) for letter, h in re.findall(r"([A-D]) h(\d+)", question.steps) if int(h) >= 36}
                assert min(behind, key=behind.get) == question.key
            elif question.kind == "grounding_all":
                assert len(re.findall(r"\d+ h\d+ ", question.steps)) == len(question.places)
            elif question.kind in ("caption_around", "caption_direction"):
                listed = re.findall(r"\d+ h(\d+) (.+?)(?= \d+ h|$)", question.steps)
                if question.kind == "caption_around":
                    said = "; ".join(f"{SECTORS[round(int(h) * 5 / 45) % 8]}: {name}" for h, name in listed)
                else:
                    said = ", ".join(name for _, name in listed)
                assert question.answer == f"{said}."
            words = re.findall(r"\b[hpdm]-?\d+\b", question.steps)
            assert set(words) <= set(STEP_WORDS)
    assert min(found.values()) > 3


def test_a_scene_has_as_many_tables_as_are_asked_for_and_always_the_same(scenes):
    for scene in scenes[:10]:
        some = tables(scene, 4, steps=True)
        assert len(some) == 4 and some == tables(scene, 4, steps=True)
    assert all(len(tables(scene, 3, ("count", "colour"))) <= 2 for scene in scenes)


def test_weights_of_kinds_are_read_and_wanted_more_often(scenes):
    assert read_weights(("count:3", "all:0.5"), ("count", "colour"), "kinds") == {"count": 3.0, "colour": 0.5}
    often = sum(q.kind == "count" for scene in scenes for q in ask(scene, 2, ("count:9", "all")))
    seldom = sum(q.kind == "count" for scene in scenes for q in ask(scene, 2))
    assert often > 2 * seldom
    for wrong, words in ((("count:0",), "above 0"), (("count", "count:2"), "named twice"), (("cuont",), "count")):
        with pytest.raises(ValueError, match=words):
            read_weights(wrong, tuple(KINDS), "the kinds of questions")


def test_rows_carry_tables_and_steps_where_they_are_asked_for():
    _, world = parse_world("synthetic://?scenes=5&seed=3&width=128&questions=6&tables=2&steps=true&backgrounds=")
    row = world.row(world.scene(0), "a.jpg")
    assert len(row["tables"]) == 2 and len(row["steps"]) == len(row["questions"])
    answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    assert [split_steps(text).steps for text in answers] == row["steps"]
    plain = World(seed=3, width=128, questions=6)
    assert not {"tables", "steps"} & set(plain.row(plain.scene(0)))


def test_some_panoramas_of_a_folder_can_be_named(tmp_path):
    samples = World(backgrounds=str(_samples()) + ":lab,park").panoramas
    assert [path.rsplit("/", 1)[1] for path in samples] == ["lab.jpg", "park.jpg"]
    _, world = parse_world("synthetic://?scenes=1&backgrounds=:lab,park")
    assert world.panoramas == World(backgrounds=f"{_samples()}:lab,park").panoramas
    with pytest.raises(ValueError, match=r"no panoramas \['mars'\]"):
        World(backgrounds=f"{_samples()}:mars")


def _samples():
    from panorama_vlm.synthetic.write import SAMPLES

    return SAMPLES
