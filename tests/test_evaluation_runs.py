"""Evaluation: a run says the same however often it is stopped, and on any number of processes."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from accelerate import Accelerator
from panorama_vlm.evaluation import run
from panorama_vlm.evaluation.asking import Answerer, Asked, Said
from panorama_vlm.evaluation.items import Item
from panorama_vlm.evaluation.report import write_report
from panorama_vlm.evaluation.run import answer_items, answer_with
from panorama_vlm.evaluation.scores import chance_of, compare, judge, summarise
from panorama_vlm.evaluation.turning import (
    Variant,
    turned_pixels,
    variants_of,
)
from panorama_vlm.places_panorama import BFoV
from panorama_vlm.tests.evaluating import command, files, launch, plain_reader, rows
from PIL import Image


def item(**fields):
    return Item(**{"id": "q", "image": "", "question": "?", "references": [], **fields})


# Runs


@pytest.fixture
def asked(make, monkeypatch, tmp_path):
    """`asked(name, items, **options)` -> the judged answers of a tiny model, and its folder."""
    plain_reader(monkeypatch)
    model, processor = make()

    def ask(name, items, **options):
        options = {"batch_size": 4, "max_new_tokens": 4, "variants": variants_of(4, 10), **options}
        output = tmp_path / name
        return answer_items(
            items, model, processor, accelerator=Accelerator(cpu=True), output=output, **options
        ), output

    ask.model, ask.processor = model, processor
    return ask


def _items(count=10):
    made = []
    for row in rows(count):
        row["places"] = [BFoV(*place) for place in row["places"]] if "places" in row else None
        made.append(Item(**{**row, "options": [tuple(option) for option in row.get("options", [])]}))
    return made


def test_order_and_batch_size_do_not_matter(asked):
    items, variants = _items(6), variants_of(2, 10)
    first, output = asked("first", items, variants=variants)
    for name, size, order in (("one", 1, items[::-1]), ("three", 3, items)):
        again, other = asked(name, order, batch_size=size, variants=variants)
        assert again == first
        assert (other / "predictions.jsonl").read_bytes() == (output / "predictions.jsonl").read_bytes()
    gone = [row for row in first.values() if row["id"] == "gone"]
    assert len(gone) == 4 and all("none.jpg" in row["error"] and row["right"] is False for row in gone)
    given = [row for (_, variant), row in first.items() if variant == "0"]
    assert [each["id"] for each in summarise(given)["errors"]] == ["gone"]
    assert ("q03", "180") not in first and ("q03", "roll 10") in first  # it does not turn


def test_a_heading_shows_the_turned_panorama(asked, panoramas, tmp_path):
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

    def stops(batches):
        for batch in batches:
            calls.append(len(batch))
            if len(calls) > 3:
                raise RuntimeError("stopped")
            yield [answers[each.key] for each in batch]

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
    assert len(part.read_text().splitlines()) == 11 + 4  # the batch of the torn line was asked once more
    calls[:] = []
    goes_on = answer_with(lambda batches: ([answers[each.key] for each in batch] for batch in batches), *arguments)
    assert goes_on == whole
    assert (tmp_path / "stopped" / "predictions.jsonl").read_bytes() == (output / "predictions.jsonl").read_bytes()
    assert not list((tmp_path / "stopped").glob("part-*"))


class _Process:
    """One of two processes, as a thread."""

    num_processes, barrier = 2, threading.Barrier(2, timeout=30)

    def __init__(self, index):
        self.process_index, self.is_main_process = index, index == 0

    def wait_for_everyone(self):
        self.barrier.wait()


def test_a_slow_process_does_not_take_new_answers_for_old_ones(tmp_path, monkeypatch):
    """It would share out the batches that are left otherwise than the fast one, and some would be asked by nobody."""
    read = run._read

    def slow(output):
        time.sleep(0.3 * (threading.current_thread().name == "slow"))
        return read(output)

    monkeypatch.setattr(run, "_read", slow)
    monkeypatch.setattr(run, "_from_main", lambda value, process: process.wait_for_everyone())
    items, found = [item(id=f"q{index}", references=["1"]) for index in range(9)], []

    def work(index):
        answers = lambda batches: ([Said("1")] * len(batch) for batch in batches)  # noqa: E731
        found.append(answer_with(answers, items, [Variant()], _Process(index), 2, tmp_path, {"model": "m"}))

    threads = [threading.Thread(target=work, args=(index,), name=("fast", "slow")[index]) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and len(found[0]) == 9


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
    items = [item(id=f"{p}-{i}", panorama=str(p), references=["1"]) for p in range(8) for i in range(3)]

    def folder(name, right, of=items):
        def answers(batches):
            for batch in batches:
                yield [Said("1" if int(each.item.panorama) < right else "0") for each in batch]

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
    plots = [ElementTree.fromstring(plot) for plot in re.findall(r"<svg.*?</svg>", page)]
    assert len(plots) == 2
    assert len(page) < 200_000 and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_the_report_shows_what_was_expected_and_what_was_said():
    shown = item(image=str(rows()[0]["image"]), kind="place", places=[BFoV(-90, 0, 40, 40)])
    judged = judge(shown, "[90, 0, 40, 40]")
    page = write_report("t", summarise([judged]), [shown], {"q": judged})
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))).convert("RGB")
    pixels = np.asarray(picture).astype(int)
    for yaw, channel, others in ((-90, 1, (0, 2)), (90, 0, (1, 2))):  # green expected, red said
        column = round((yaw / 360 + 0.5) * 512)
        line = pixels[98:102, column - 10 : column + 10].mean((0, 1))  # the upper edge, 20 degrees up
        assert line[channel] > max(line[other] for other in others) + 60, (yaw, line)
    assert "[-90, 0, 40, 40]" in page and "IoU 0.00" in page


# The command


@pytest.fixture
def folder(make, tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
@pytest.mark.soak
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


@pytest.mark.soak
@pytest.mark.slow
def test_two_processes_say_what_one_says(folder):
    one, two = (launch(folder, "--output", folder / str(n), processes=n) for n in (1, 2))
    assert one.returncode == two.returncode == 0, two.stderr[-2000:]
    assert files(folder / "1") == files(folder / "2")
    again = launch(folder, "--output", folder / "1", "--compare", folder / "2")
    assert again.returncode == 0 and "share of draws above zero" in again.stdout
    assert json.loads((folder / "1" / "metrics.json").read_text())["compare"]["headline"]["difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [["--batch-size", "0"], ["--metrics", "glory"], ["--compare", "nowhere"], ["--peer", "nobody"]]
)
def test_the_command_refuses_in_one_sentence(folder, wrong):
    words, environment = command(folder, 1, "--output", folder / "x", *wrong)
    plain = [sys.executable, *words[words.index("panorama_vlm.evaluation") - 1 :]]  # accelerate launch says 1, always
    done = subprocess.run(plain, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and wrong[-1] in done.stderr


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


def test_steps_are_kept_apart_from_what_is_judged(tmp_path):
    items = [item(id=f"q{index}", references=["left"], panorama=f"p{index}") for index in range(3)]
    said = [Said("left", steps="h1"), Said("left"), Said("", steps="h1 -")]
    numbered = dict(zip(("q0", "q1", "q2"), said, strict=True))
    arguments = (items, [Variant()], _Process(0), 2, tmp_path, {"model": "m"})
    _Process.num_processes, before = 1, _Process.num_processes
    try:
        _Process.barrier = threading.Barrier(1)
        judged = answer_with(lambda batches: ([numbered[each.item.id] for each in b] for b in batches), *arguments)
    finally:
        _Process.num_processes, _Process.barrier = before, threading.Barrier(2, timeout=30)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {line["id"]: line.get("steps") for line in lines} == {"q0": "h1", "q1": None, "q2": "h1 -"}
    assert {key[0]: row["right"] for key, row in judged.items()} == {"q0": True, "q1": True, "q2": False}
