"""Evaluation: what answers are worth, and that a run says the same however often it is stopped."""

import json
import os
import re
import signal
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from accelerate import Accelerator
from panorama_vlm.evaluation import bootstrap
from panorama_vlm.evaluation.answers import _assign, chosen_option, compare_places, in_target, normalise
from panorama_vlm.evaluation.captions import caption_scores, tokenise
from panorama_vlm.evaluation.items import Item
from panorama_vlm.evaluation.report import write_report
from panorama_vlm.evaluation.run import answer_items, answer_with
from panorama_vlm.evaluation.scores import chance_of, compare, judge, most_common_answers, summarise
from panorama_vlm.evaluation.turning import (
    SECTORS,
    Variant,
    answers_turned,
    direction_in_words,
    tilted_pixels,
    turn_report,
    turned_item,
    turned_pixels,
    turned_words,
    variants_of,
)
from panorama_vlm.places_panorama import BFoV
from panorama_vlm.tests.evaluating import command, files, launch, plain_reader, rows

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


# Runs


@pytest.fixture
def asked(make, monkeypatch, tmp_path):
    """`asked(name, items, **options)` -> the judged answers of a tiny model, and its folder."""
    plain_reader(monkeypatch)
    model, processor = make()

    def run(name, items, **options):
        options = {"batch_size": 4, "max_new_tokens": 4, "variants": variants_of(4, 10), **options}
        output = tmp_path / name
        return answer_items(
            items, model, processor, accelerator=Accelerator(cpu=True), output=output, **options
        ), output

    run.model, run.processor = model, processor
    return run


def _items(count=10):
    made = []
    for row in rows(count):
        row["places"] = [BFoV(*place) for place in row["places"]] if "places" in row else None
        made.append(Item(**{**row, "options": [tuple(option) for option in row.get("options", [])]}))
    return made


def test_order_and_batch_size_do_not_matter(asked):
    items = _items(6)
    first, output = asked("first", items)
    for name, size, order in (("one", 1, items[::-1]), ("three", 3, items)):
        again, other = asked(name, order, batch_size=size)
        assert again == first
        assert (other / "predictions.jsonl").read_bytes() == (output / "predictions.jsonl").read_bytes()
    gone = [row for row in first.values() if row["id"] == "gone"]
    assert len(gone) == 6 and all("none.jpg" in row["error"] and row["right"] is False for row in gone)
    given = [row for (_, variant), row in first.items() if variant == "0"]
    assert [each["id"] for each in summarise(given)["errors"]] == ["gone"]
    assert ("q03", "90") not in first and ("q03", "roll 10") in first  # it does not turn


def test_a_heading_shows_the_turned_panorama(asked, panoramas, tmp_path):
    from panorama_vlm.evaluation.asking import Answerer, Asked
    from PIL import Image

    panoramas[0].save(tmp_path / "straight.png")
    Image.fromarray(turned_pixels(np.asarray(panoramas[0]), 90)).save(tmp_path / "turned.png")
    ask = Answerer(asked.model, asked.processor, 4)
    turned = ask._inputs([Asked(item(image=str(tmp_path / "straight.png")), Variant(90))])["pixel_values"]
    straight = ask._inputs([Asked(item(image=(tmp_path / "turned.png").read_bytes()))])["pixel_values"]
    assert bool((turned == straight).all())
    blind = Answerer(asked.model, asked.processor, 4, blind=True)._inputs(
        [Asked(item(image=str(tmp_path / "turned.png")))]
    )
    assert len(blind["pixel_values"].unique()) == 1


def test_a_stopped_run_goes_on(asked, tmp_path):
    items = _items()
    whole, output = asked("whole", items)
    calls = []

    def stops(batch):
        calls.append(len(batch))
        if len(calls) > 3:
            raise RuntimeError("stopped")
        return [answers[each.key] for each in batch]

    from panorama_vlm.evaluation.asking import Said

    answers = {key: Said(row["answer"], row.get("error")) for key, row in whole.items()}
    arguments = (items, variants_of(4, 10), Accelerator(cpu=True), 4, tmp_path / "stopped", {"model": "m"})
    with pytest.raises(RuntimeError, match="stopped"):
        answer_with(stops, *arguments)
    part = tmp_path / "stopped" / "part-00000.jsonl"
    assert len(part.read_text().splitlines()) == 12
    part.write_text(part.read_text()[:-20])  # torn
    calls[:] = [0, 0]  # one batch again, and then stopped once more
    with pytest.raises(RuntimeError, match="stopped"):
        answer_with(stops, *arguments)
    calls[:] = [-1000] * 1
    assert answer_with(lambda batch: [answers[each.key] for each in batch], *arguments) == whole
    assert (tmp_path / "stopped" / "predictions.jsonl").read_bytes() == (output / "predictions.jsonl").read_bytes()
    assert not list((tmp_path / "stopped").glob("part-*"))


def test_another_run_is_refused_in_the_same_folder(asked, make):
    items = _items()
    _, output = asked("same", items)
    before = files(output)
    asked("same", items)
    assert files(output) == before
    with pytest.raises(ValueError, match="max_new_tokens was 4 and is 5"):
        asked("same", items, max_new_tokens=5)
    with pytest.raises(ValueError, match="questions was"):
        asked("same", items[1:])
    with pytest.raises(ValueError, match="variants was"):
        asked("same", items, variants=variants_of(2))
    asked.model.lm_head.weight.data += 1
    with pytest.raises(ValueError, match="weights was"):
        asked("same", items)
    (output / "run.json").unlink()
    with pytest.raises(ValueError, match="no run.json"):
        asked("same", items)


def test_two_models_are_compared_on_the_same_questions(asked, tmp_path):
    from panorama_vlm.evaluation.asking import Said

    items = [item(id=f"{p}-{i}", panorama=str(p), references=["1"]) for p in range(8) for i in range(3)]

    def folder(name, right, of=items):
        answers = lambda batch: [Said("1" if int(each.item.panorama) < right else "0") for each in batch]  # noqa: E731
        answer_with(answers, of, [Variant()], Accelerator(cpu=True), 4, tmp_path / name, {"model": name})
        return tmp_path / name

    good, bad = folder("good", 6), folder("bad", 2)
    found = compare(good, bad)["headline"]
    assert (found["first"], found["second"], found["difference"]) == (0.75, 0.25, 0.5)
    assert found["above_zero"] > 0.97 and 0 <= found["interval"][0] < 0.5 < found["interval"][1] <= 1
    assert compare(good, good)["headline"] | {"first": 0, "second": 0} == {
        **{"first": 0, "second": 0, "difference": 0.0, "interval": [0.0, 0.0], "above_zero": 0.0}
    }
    with pytest.raises(ValueError, match="3 are only in the first"):
        compare(good, folder("fewer", 2, items[3:]))
    with pytest.raises(ValueError, match="no finished evaluation"):
        compare(good, tmp_path / "nothing")


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith("data:image/jpeg")
        ]


@pytest.mark.parametrize(
    "answer", ["", "x" * 200_000, "<script>alert(1)</script><img src=x onerror=y>", "[0, 0, 9, 9] " * 500]
)
def test_the_report_escapes_what_comes_from_outside(answer):
    hostile = "<script>alert('&')</script>"
    made = [
        item(id=f"{hostile}{i}", kind=hostile, question=hostile, references=[hostile], places=p)
        for i, p in ((0, None), (1, []))
    ]
    made += [
        item(id="o", options=[("A", hostile)], key="A", image=str(rows()[0]["image"]), places=[BFoV(0, 0, 20, 20)])
    ]
    judged = [judge(each, answer) for each in made]
    judged[0] |= {"error": hostile, "right": False}
    page = write_report(hostile, summarise(judged, chance_of(made)), made, {each["id"]: each for each in judged})
    read = _Tags()
    read.feed(page)
    assert "script" not in read.tags and not read.links and "onerror=y>" not in page.replace("&gt;", "")
    assert len(page) < 200_000 and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


# The command


@pytest.fixture
def folder(make, tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
def test_killed_and_resumed_on_two_processes_is_the_same_to_the_byte(folder):
    options = ("--turn", "4", "--tilt", "10", "--blind", "--always-most-common")
    whole = launch(folder, "--output", folder / "whole", *options)
    assert whole.returncode == 0, whole.stderr[-2000:]
    words, environment = command(folder, 1, "--output", folder / "killed", *options)
    process = subprocess.Popen(
        words, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    part = folder / "killed" / "part-00000.jsonl"
    while process.poll() is None and not (part.is_file() and part.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert part.is_file() and not (folder / "killed" / "metrics.json").exists()
    with open(part, "a") as file:
        file.write('{"id": "q0')  # torn
    resumed = launch(folder, "--output", folder / "killed", *options, processes=2)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert files(folder / "killed") == files(folder / "whole")
    assert resumed.stdout == whole.stdout
    names = {
        "predictions.jsonl",
        "metrics.json",
        "report.html",
        "model-index.yml",
        "run.json",
        "blind/predictions.jsonl",
    }
    assert names <= set(files(folder / "whole"))


@pytest.mark.slow
def test_two_processes_say_what_one_says(folder):
    one, two = (launch(folder, "--output", folder / str(n), processes=n) for n in (1, 2))
    assert one.returncode == two.returncode == 0, two.stderr[-2000:]
    assert files(folder / "1") == files(folder / "2")
    again = launch(folder, "--output", folder / "1", "--compare", folder / "2")
    assert again.returncode == 0 and "share of draws above zero" in again.stdout
    assert json.loads((folder / "1" / "metrics.json").read_text())["compare"]["headline"]["difference"] == 0


@pytest.mark.slow
def test_the_command_refuses_in_one_sentence(folder):
    for wrong in (
        ["--batch-size", "0"],
        ["--metrics", "glory"],
        ["--compare", "nowhere"],
        ["--peer", str(folder / "no")],
    ):
        run = launch(folder, "--output", folder / "x", *wrong)
        assert run.returncode != 0
        errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, run.stderr[-2000:]


def test_any_other_model_can_be_asked(folder, tokenizer, monkeypatch):
    from panorama_vlm.evaluation.evaluate import load_peer
    from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor

    plain_reader(monkeypatch)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = AutoConfig.for_model(
        "llava",
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, **small},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **small},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    template = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}"
        "{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "peer")
    processor.save_pretrained(folder / "peer")
    accelerator = Accelerator(cpu=True)
    loaded = load_peer(str(folder / "peer"), accelerator)
    options = {"accelerator": accelerator, "max_new_tokens": 4}
    one, three = (answer_items(_items(), *loaded, batch_size=n, output=folder / str(n), **options) for n in (1, 3))
    assert one == three and len(one) == 11
    assert sum("error" in row for row in one.values()) == 1
