import collections
import itertools
import random

import numpy as np
import pytest
import torch
from panorama_vlm.ask import question
from panorama_vlm.headings_panorama import elect, turned_back
from panorama_vlm.places_panorama import SECTORS, turned_places, wrap
from PIL import Image

COUNT = "How many cubes are there?"


def in_turn(said, answers):
    """The model says these, one after another."""
    each = itertools.cycle(answers)
    said(lambda prompt: next(each))


def test_the_model_sees_what_somebody_sees_who_has_turned(pipe, said, panoramas):
    said(lambda prompt: "two")
    pipe(panoramas[0], COUNT, headings=4, turn_words=False)
    pixels = np.asarray(panoramas[0])
    assert len(said.asked) == 4
    for number, asked in enumerate(said.asked):
        rolled = Image.fromarray(np.roll(pixels, -number * pixels.shape[1] // 4, 1))
        made = pipe.preprocess({"messages": question(rolled, COUNT)})["inputs"]
        assert torch.allclose(asked.pixel_values, made["pixel_values"], atol=2e-3)


@pytest.mark.parametrize(
    ("answers", "answer", "agreement", "heading"),
    [
        (["two", "three", "three", "three"], "three", 0.75, 90),
        (["Two.", "three", "two", "three"], "Two.", 0.5, 0),  # as many: what is said at the front
        (["one", "two", "three", "four"], "one", 0.25, 0),
        (["<think>1 h9 cube</think>one", "two", "one", "one"], "one", 0.75, 0),
        (["", "", "two", "two"], "", 0.5, 0),
    ],
)
def test_what_is_said_at_most_headings_is_the_answer(pipe, said, panoramas, answers, answer, agreement, heading):
    in_turn(said, answers)
    found = pipe(panoramas[0], COUNT, headings=4, turn_words=False)
    assert (found["answer"], found["agreement"], found["heading"]) == (answer, agreement, heading)
    assert found["votes"] == [each.rpartition(">")[2] for each in answers]
    in_turn(said, answers)
    assert pipe.ask(panoramas[0], COUNT, headings=4, turn_words=False) == answer


def test_places_turn_back_and_agree_where_they_overlap(pipe, said, panoramas):
    yaws = [30, 30 - 90 + 2, 150, wrap(30 - 270)]  # a thing at 30 degrees; at 180 the model sees another one
    in_turn(said, [f"[{yaw}, -10, 20, 12]" for yaw in yaws])
    found = pipe(panoramas[0], "Where is it?", headings=4, turn_words=False)
    assert (found["answer"], found["agreement"]) == ("[30, -10, 20, 12]", 0.75)
    in_turn(said, [f"[{yaw}, -10, 20, 12]" for yaw in [100, *yaws[1:]]])
    (place,) = pipe.point(panoramas[0], "cube", headings=4, turn_words=False)
    assert (place.label, place.place) == ("cube", (32, -10, 20, 12))


def test_words_turn_back_only_where_that_is_said(pipe, said, panoramas):
    seen = ["back-right", "front-right", "front-left", "back-left"]  # behind to the right, from the front
    in_turn(said, seen)
    found = pipe(panoramas[0], "Where is the cube?", headings=4, turn_words=True)
    assert (found["answer"], found["agreement"]) == ("back-right", 1.0)
    in_turn(said, seen)
    assert pipe(panoramas[0], "Where is the cube?", headings=4, turn_words=False)["agreement"] == 0.25


@pytest.mark.parametrize("heading", range(0, 360, 45))
def test_a_list_by_direction_begins_at_the_front_again(heading):
    things = [("front", "bus"), ("right", "cat"), ("right", "red cube"), ("back-left", "cat")]
    turned = [(SECTORS[(SECTORS.index(way) - heading // 45) % 8], name) for way, name in things]
    text = "; ".join(f"{way}: {name}" for way, name in sorted(turned, key=lambda each: SECTORS.index(each[0])))
    assert turned_back(text + ".", heading, True) == "front: bus; right: cat; right: red cube; back-left: cat."
    plain = "A bus; to the right of it a cat."
    assert turned_back(plain, 0, True) == plain


def test_turning_and_turning_back_is_nothing():
    draw = random.Random(3)
    for _ in range(200):
        places = [[draw.randrange(-180, 180), draw.randrange(-60, 60), 20, 10] for _ in range(draw.randrange(4))]
        text, heading = f"They are at {places}.", draw.randrange(360)
        assert turned_places(turned_places(text, heading), -heading) == text
    assert turned_places("[20, 0, 9, 9], [20.0, 0, 9, 9]", 360 / 7) == "[-31, 0, 9, 9], [-31.4286, 0, 9, 9]"
    assert turned_places("[-179, 0, 9, 9]", 0.6) == "[-180, 0, 9, 9]"
    assert turned_places("yaw 10, pitch 3, x_fov 20, y_fov 10", 30) is None
    no_places = "[0, 1, 2, 300], [1, 2, 3], [0, 100, 2, 3] and [1, 2, 3, 4, 5]"
    assert turned_places(no_places, 30) == no_places


def test_the_election_is_that_of_counting():
    draw = random.Random(5)
    for _ in range(300):
        answers = [draw.choice(["a", "b", "c d", "C, d!", ""]) for _ in range(draw.randrange(1, 9))]
        plain = [answer.lower().replace(",", "").strip("!") for answer in answers]
        votes = collections.Counter(plain)
        number, share = elect(answers)
        assert votes[plain[number]] == max(votes.values()) == round(share * len(answers))
        assert number == min(n for n, answer in enumerate(plain) if votes[answer] == max(votes.values()))
    assert elect([None, "a", None]) == (1, 1 / 3)
    assert elect(["cube [0, 0, 20, 20]", "ball [0, 0, 20, 20]", "ball [2, 0, 20, 20]"])[0] == 1
    assert elect(["[[0, 0, 9, 9], [50, 0, 9, 9]]", "[0, 0, 9, 9]", "[[50, 0, 9, 9], [0, 1, 9, 9]]"]) == (0, 2 / 3)


def test_places_in_a_question_turn_along(pipe, said, panoramas):
    said(lambda prompt: "a cube")
    pipe(panoramas[0], "What is at [170, 5, 20, 10]?", headings=2, turn_words=False)
    assert ["[170, 5, 20, 10]" in said.asked[0].prompt, "[-10, 5, 20, 10]" in said.asked[1].prompt] == [True, True]
    with pytest.raises(ValueError, match="is not written as"):
        pipe(panoramas[0], "What is at yaw=170, pitch=5, x_fov=20, y_fov=10?", headings=2, turn_words=False)


def test_many_panoramas_and_chats_vote_each_for_itself(pipe, said, panoramas):
    answers = ["one", "two", "two", "three", "four", "four"]
    in_turn(said, answers)
    found = pipe(panoramas[:2], COUNT, headings=3, turn_words=False)
    assert [each["answer"] for each in found] == ["two", "four"]
    in_turn(said, answers)
    asked = pipe(({"panorama": each, "question": COUNT} for each in panoramas[:2]), headings=3, turn_words=False)
    assert next(asked)["answer"] == "two" and len(said.asked) < 12  # read as it goes
    in_turn(said, answers)
    assert pipe(question(panoramas[0], COUNT), headings=3, turn_words=False)["answer"] == "two"
    assert pipe([], COUNT, headings=3, turn_words=False) == []


def test_a_heading_of_its_own_is_where_turning_begins(pipe, said, panoramas):
    said(lambda prompt: "two")
    chat = question(panoramas[0], COUNT)
    chat[0]["content"][0]["yaw_offset"] = 90.0
    pipe(chat, headings=2, turn_words=False)
    pipe(panoramas[0], COUNT, headings=4, turn_words=False)
    assert torch.equal(said.asked[0].pixel_values, said.asked[3].pixel_values)
    assert torch.equal(said.asked[1].pixel_values, said.asked[5].pixel_values)


def test_batches_of_a_real_model_say_what_it_says_alone(pipe, panoramas):
    own = {"headings": 4, "turn_words": False, "max_new_tokens": 6}
    alone = pipe(panoramas[0], COUNT, **own)
    assert pipe(panoramas[0], COUNT, batch_size=4, **own) == alone
    assert pipe(panoramas[0], COUNT, headings=1, max_new_tokens=6) == pipe(panoramas[0], COUNT, max_new_tokens=6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headings": 0, "turn_words": False}, "headings must be"),
        ({"headings": 2.5, "turn_words": False}, "headings must be"),
        ({"headings": 73, "turn_words": False}, "headings must be at most 72"),
        ({"headings": 4}, "turn_words must be given"),
        ({"headings": 4, "turn_words": "no"}, "turn_words must be given"),
        ({"headings": 3, "turn_words": True}, "eight directions"),
        ({"headings": 2, "turn_words": False, "look_twice": True}, "do not go together"),
    ],
)
def test_what_cannot_vote_is_named(pipe, panoramas, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(panoramas[0], COUNT, **options)


def test_what_turns_by_itself_or_is_streamed_does_not_vote(pipe, panoramas):
    with pytest.raises(ValueError, match="before headings can vote"):
        pipe.ask(panoramas[0], COUNT, stream=True, headings=2, turn_words=False)
    with pytest.raises(ValueError, match="leave headings out"):
        pipe.describe(panoramas[0], headings=2, turn_words=False)
    chat = question(panoramas[0], COUNT)
    chat[0]["content"][0]["further_views"] = [(0, 0, 40)]
    with pytest.raises(ValueError, match="further views do not go together"):
        pipe(chat, headings=2, turn_words=False)
