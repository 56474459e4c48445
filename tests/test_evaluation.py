"""Evaluation: what answers are worth, and how they turn with the panorama."""

import numpy as np
import pytest
from panorama_vlm.evaluation import bootstrap
from panorama_vlm.evaluation.answers import _assign, chosen_option, compare_places, in_target, normalise
from panorama_vlm.evaluation.captions import caption_scores, tokenise
from panorama_vlm.evaluation.items import Item
from panorama_vlm.evaluation.scores import chance_of, judge, most_common_answers, summarise
from panorama_vlm.evaluation.turning import (
    answers_turned,
    turn_report,
    turned_item,
    turned_pixels,
    variants_of,
)
from panorama_vlm.places_panorama import SECTORS, BFoV, direction_in_words, turned_words
from panorama_vlm.sampling_panorama import tilted_pixels

CHOICES = [("A", "cat"), ("B", "dog"), ("C", "Vitamin C"), ("D", "the red car"), ("E", "red car park")]
BLUE = [("A", "front"), ("B", "front-right"), ("C", "no"), ("D", "2")]


def item(**fields):
    return Item(**{"id": "q", "image": "", "question": "?", "references": [], **fields})


# Words


@pytest.mark.parametrize(
    "one, other",
    [
        ("yes.", "Yes"),
        ("The  Dog!", "a dog"),
        ("two chairs", "2 chairs"),
        ("Twelve", "12"),
        ("1,000", "1000"),
        ("don't", "dont"),
        ("front-right", "front right"),
        ("−5", "-5"),
        ("ＹＥＳ", "yes"),
        ("“sofa”\n", "sofa"),
    ],
)
def test_equal_words(one, other):
    assert normalise(one) == normalise(other)
    assert judge(item(references=["x", other]), one)["right"]


@pytest.mark.parametrize(
    "one, other", [("yes", "no"), ("3.5", "35"), ("5", "-5"), ("", ""), ("...", ""), ("yes it is", "yes")]
)
def test_other_words(one, other):
    assert judge(item(references=[other]), one)["right"] is False


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "B.", "B)", "**B**", "[b]", "B. dog", "B: dog", "(B) dog", "B - dog", "dog", "A dog.", "The DOG"]
    + ["It is a dog", "Dog, of course", "B.\nBecause it barks.", "Answer: B", "The answer is (B), I think", "Option B"]
    + ["B. dog, not the cat", "hound"],
)
def test_accepted_choices(answer):
    judged = judge(item(options=CHOICES, key="B", references=["hound"]), answer)
    assert judged["right"] and judged["read"] == "dog"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A",
        "F",
        "cat",
        "A or B",
        "A. or B.",
        "(A) (B)",
        "B. cat",
        "A. cat\nB. dog",
        "cat or dog",
        "I see no dog here",
    ]
    + ["hounds", "dogs", "Answer: A", "the red car park"],
)
def test_refused_choices(answer):
    assert not judge(item(options=CHOICES, key="B", references=["hound"]), answer)["right"]


def test_choices_that_contain_one_another():
    assert chosen_option("C. Vitamin C.", CHOICES) == chosen_option("vitamin c", CHOICES) == "C"
    assert chosen_option("front right", BLUE) == chosen_option("It is at the front-right", BLUE) == "B"
    assert chosen_option("It is in front", BLUE) == "A"
    assert chosen_option("two", BLUE) == "D" and chosen_option("I have no idea", BLUE) == ""
    assert chosen_option("2", [("1", "2"), ("2", "3")]) == ""  # a key, and the text of another
    assert chosen_option("same", [("A", "same"), ("B", "same")]) == ""


# Places


def test_places_are_matched_one_to_one():
    random = np.random.default_rng(0)
    from scipy.optimize import linear_sum_assignment

    for _ in range(100):
        size = random.integers(1, 7)
        cost = random.normal(size=(size, size + random.integers(0, 4)))
        columns = _assign(cost)
        assert len(set(columns)) == size
        assert cost[range(size), columns].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum())


def test_places_by_hand():
    here, there = BFoV(175, 0, 20, 20), BFoV(20, 0, 10, 10)
    judged = judge(item(places=[here, there]), "[[20, 0, 10, 10], [-175, 0, 20, 20]]")
    assert judged["iou"] == pytest.approx((1 + 1 / 3) / 2) and judged["iou_50"] == 0.5 and not judged["right"]
    assert judged["centre_error"] == pytest.approx(5)  # 10 degrees across the seam, and none
    assert judge(item(places=[here]), "[175, 0, 20, 20]")["right"]
    too_much = judge(item(places=[here]), "[[175, 0, 20, 20], [0, 0, 5, 5]]")
    assert not too_much["right"] and too_much["iou"] == 0.5
    assert judge(item(places=[]), "[]")["right"] and not judge(item(places=[]), "[0, 0, 5, 5]")["right"]
    assert not judge(item(places=[]), "")["right"] and not judge(item(places=[here]), "none")["right"]
    assert compare_places([here], [])["centre_error"] is None
    far = judge(item(places=[BFoV(0, 0, 10, 10)]), "yaw=90 pitch=0 x_fov=10 y_fov=10")
    assert far["iou"] == 0 and far["centre_error"] == pytest.approx(90)


def test_targets_across_the_seam():
    target = item(more={"target_yaw": [170, -170], "target_pitch": [-10, 10]})
    for answer in ("[175, 0, 5, 5]", "yaw=-179 pitch=10", "(180, -5)", "[-175, 0, 9, 9] [0, 0, 9, 9]"):
        assert judge(target, answer)["right"], answer
    for answer in ("[165, 0, 5, 5]", "yaw=-179 pitch=11", "", "left", "[0, 0, 9, 9] [175, 0, 5, 5]"):
        assert not judge(target, answer)["right"], answer
    assert in_target((12, 3), [-180, 180], [0, 5]) and in_target((-170, 0), [160, 200], [0, 0])
    assert judge(target, "")["yaw"] == -180
    share = chance_of([target])["q"]
    assert share == pytest.approx(20 / 360 * np.sin(np.radians(10)))


# Figures


def test_the_interval_is_that_of_a_plain_loop():
    random = np.random.default_rng(3)
    panoramas = [f"p{index}" for index in random.integers(0, 12, size=60)]
    right = random.integers(0, 2, size=60).astype(float)
    kinds = [str(index) for index in random.integers(0, 2, size=60)]
    sums, counts, names = bootstrap.by_panorama(right, panoramas, kinds)
    drawn = bootstrap.drawn_means(sums, counts, draws=200, seed=5)
    rng, order, means = np.random.default_rng(5), sorted(set(panoramas)), []
    for _ in range(200):
        picked = [order[index] for index in rng.integers(len(order), size=len(order))]
        by_kind = {name: [] for name in names}
        for panorama in picked:
            for value, own, kind in zip(right, panoramas, kinds, strict=True):
                if own == panorama:
                    by_kind[kind].append(value)
        means.append([sum(values) / len(values) if values else np.nan for values in by_kind.values()])
    np.testing.assert_allclose(drawn, means)
    assert bootstrap.interval(drawn[:, 0]) == pytest.approx(list(np.nanquantile(np.array(means)[:, 0], [0.025, 0.975])))


def test_questions_of_one_panorama_are_drawn_together():
    judged = [
        judge(item(id=f"{p}{i}", panorama=f"{p}", references=["1"]), "1" if p < 5 else "2")
        for p in range(10)
        for i in range(9)
    ]
    low, high = summarise(judged)["headline"]["interval"]
    assert high - low > 0.5  # of ten panoramas, not of ninety questions


def test_the_headline_is_the_mean_over_groups():
    made = [item(id=f"a{i}", kind="a", group="x", references=["1"]) for i in range(3)]
    made += [item(id=f"b{i}", kind="b", group="x", references=["1"]) for i in range(1)]
    made += [item(id=f"c{i}", kind="c", options=[("A", "u"), ("B", "v")], key="A") for i in range(2)]
    answers = ["1", "1", "0", "0", "A", "A"]
    judged = [judge(*pair) for pair in zip(made, answers, strict=True)]
    metrics = summarise(judged, chance_of(made))
    assert metrics["headline"]["accuracy"] == (2 / 4 + 1) / 2 and metrics["headline"]["chance"] == (1 + 0.5) / 2
    assert metrics["kinds"]["a"]["accuracy"] == 2 / 3 and metrics["kinds"]["a"]["count"] == 3
    assert metrics == summarise(judged[::-1], chance_of(made[::-1]))
    assert most_common_answers(made) == {"a": "1", "b": "1", "c": "A"}


def test_caption_metrics_are_those_of_the_libraries():
    import sacrebleu
    from pycocoevalcap.cider.cider import Cider
    from rouge_score.rouge_scorer import RougeScorer

    answers = ["a cat sits on the mat in the sun", "two dogs run over the green field", "a quiet room"]
    wanted = [
        ["a cat sits on the mat in the shade", "the cat is on a mat"],
        ["dogs run over a green field"],
        ["an empty room"],
    ]
    scores = caption_scores(answers, wanted)
    streams = [[texts[0] for texts in wanted], [wanted[0][1], None, None]]
    assert scores["BLEU-4"]["value"] == sacrebleu.corpus_bleu(answers, streams).score
    assert "tok:13a" in scores["BLEU-4"]["signature"]
    rouge = RougeScorer(["rougeL"])
    best = [max(rouge.score(w, a)["rougeL"].fmeasure for w in texts) for a, texts in zip(answers, wanted, strict=True)]
    assert scores["ROUGE-L"]["value"] == pytest.approx(np.mean(best))
    gts = {i: [w for w in texts] for i, texts in enumerate(wanted)}
    assert scores["CIDEr"]["value"] == pytest.approx(
        Cider().compute_score(gts, {i: [a] for i, a in enumerate(answers)})[0]
    )
    assert "PTBTokenizer" in scores["CIDEr"]["signature"]
    assert tokenise("The CAT’s mat, two-seated.") == "the cat's mat two seated"


def test_without_java_there_is_a_word_in_place_of_meteor(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    score = caption_scores(["a"], [["a"]], ["METEOR"])["METEOR"]
    assert score["value"] is None and "Java" in score["why"]


# Turned and tilted


def test_words_of_direction_turn():
    for index, name in enumerate(SECTORS):
        for step in range(8):
            assert turned_words(name, 45 * step) == SECTORS[(index - step) % 8]
    assert turned_words("To the Front Right of the LEFT door", 90) == "To the Front left of the BACK door"
    assert direction_in_words("at the back-left") == -135 and direction_in_words("left or right") is None


def test_items_turn_with_their_answers():
    place = turned_item(item(places=[BFoV(30, 5, 10, 10)]), 90)
    assert place.places == [BFoV(-60, 5, 10, 10)]
    target = turned_item(item(more={"target_yaw": [80, 100], "target_pitch": [-5, 5]}), 90)
    assert judge(target, "(0, 0)")["right"]
    words = item(references=["front-right"], more={"turns": "direction"})
    assert turned_item(words, 45).references == ["front"] and turned_item(words, 30) is None
    assert (
        turned_item(item(more={"turns": "no"}), 90) is None and turned_item(item(more={"turns": "no"}), 0) is not None
    )
    two = item(options=[("A", "front"), ("B", "left")], key="B", more={"turns": "direction"})
    assert turned_item(two, 90).options == [("A", "left"), ("B", "back")] and turned_item(two, 90).key == "B"
    four = item(
        options=list(zip("ABCD", ["front", "right", "back", "left"], strict=True)), key="B", more={"turns": "direction"}
    )
    assert turned_item(four, 90).options == four.options and turned_item(four, 90).key == "A"
    always_b = [judge(four, "B"), judge(turned_item(four, 90), "B")]
    assert not answers_turned(four, *always_b, 90)  # the same letter is another direction
    assert answers_turned(four, judge(four, "C"), judge(turned_item(four, 90), "B"), 90)  # wrong, and turned
    spot = item(places=[BFoV(30, 0, 20, 20)])
    said = [judge(spot, "[100, 0, 20, 20]"), judge(turned_item(spot, 90), "[12, 0, 20, 20]")]
    assert answers_turned(spot, *said, 90) and not answers_turned(spot, said[0], said[0], 90)


def test_a_target_turns_even_where_it_is_a_place_too():
    target = item(places=[BFoV(90, 0, 20, 10)], more={"target_yaw": [80, 100], "target_pitch": [-5, 5]})
    turned = turned_item(target, 90)
    assert turned.places == [BFoV(0, 0, 20, 10)] and judge(turned, "(0, 0)")["right"]
    said = [judge(target, "(30, 0)"), judge(turned, "(-55, 0)"), judge(turned, "(30, 0)"), judge(turned, "left")]
    assert [answers_turned(target, said[0], other, 90) for other in said[1:]] == [True, False, False]


def test_turn_report_by_hand():
    made = [item(id="p", places=[BFoV(0, 0, 20, 20)]), item(id="n", references=["1"], more={"turns": "no"})]
    made += [item(id="d", references=["front"], more={"turns": "direction"})]
    variants = variants_of(3, 5)
    judged = {}
    for each in made:
        for variant in variants:
            if (own := turned_item(each, variant.heading)) is not None:
                judged[each.id, variant.name] = judge(own, "[0, 0, 20, 20]" if each.id == "p" else "1")
    report = turn_report(made, judged, variants)
    assert report["turn"]["accuracy"] == {"0": 1.0, "120": 0.0, "240": 0.0} and report["turn"]["spread"] == 1.0
    assert report["turn"]["consistency"] == 0.0 and report["turn"]["pairs"] == 2 and report["turn"]["count"] == 1
    assert report["turn"]["left_out"] == {"does not turn": 1, "between the eight directions": 1}
    assert report["tilt"]["accuracy"]["pitch 5"] == pytest.approx(2 / 3) and report["tilt"]["count"] == 3


def test_the_answer_of_most_headings_is_counted():
    """Right at the front or not; turned along or not; elected by counting."""
    made = [
        item(id="words", references=["front-right"], more={"turns": "direction"}),
        item(id="place", places=[BFoV(30, 0, 20, 20)], references=["[30, 0, 20, 20]"]),
        item(id="letter", options=[("A", "front"), ("B", "left")], key="B", more={"turns": "direction"}),
        item(id="tie", references=["two"]),
        item(id="broken", references=["two"]),
    ]
    says = {
        "words": ["left", "front-left", "back-left", "right"],  # right at 90 and 180
        "place": ["[30, 0, 20, 20]", "[0, 0, 20, 20]", "[10, 0, 20, 20]", "[-60, 0, 20, 20]"],  # at the front alone
        "letter": ["A", "B", "B", "B"],
        "tie": ["three", "two", "two", "three"],
        "broken": ["", "two", "", ""],
    }
    judged = {}
    for each in made:
        for number, variant in enumerate(variants_of(4)):
            row = judge(turned_item(each, variant.heading), says[each.id][number])
            judged[each.id, variant.name] = row | ({"error": "gone"} if each.id == "broken" and number != 1 else {})
    turn = {each.id: turn_report([each], judged, variants_of(4))["turn"] for each in made}
    assert {name: each["vote"] for name, each in turn.items()} == {
        **{"words": 1.0, "letter": 1.0, "broken": 1.0},  # left is another direction at each heading
        **{"place": 1.0, "tie": 0.0},  # as many votes: what is said at the front
    }
    assert turn_report(made, judged, variants_of(4))["turn"]["vote"] == pytest.approx(4 / 5)


def _brightest(pixels):
    """Yaw and pitch of the brightest pixel."""
    height, width = pixels.shape[:2]
    row, column = np.unravel_index(pixels[..., 0].astype(int).argmax(), (height, width))
    return ((column + 0.5) / width - 0.5) * 360, (0.5 - (row + 0.5) / height) * 180


def test_panoramas_turn_and_tilt():
    sphere = np.zeros((90, 180, 3), np.uint8)
    sphere[44:46, 89:91] = 255  # in front, on the horizon
    assert _brightest(turned_pixels(sphere, 90)) == pytest.approx((-90, 0), abs=2)
    assert _brightest(tilted_pixels(sphere, 30, 0)) == pytest.approx((0, -30), abs=2)  # looking up, it lies lower
    assert _brightest(tilted_pixels(turned_pixels(sphere, -90), 0, 30)) == pytest.approx((90, 30), abs=2)
    np.testing.assert_array_equal(tilted_pixels(sphere, 0, 0), sphere)
    back = tilted_pixels(tilted_pixels(sphere.astype(np.float32), 30, 0), -30, 0)
    assert _brightest(back) == pytest.approx((0, 0), abs=2)
