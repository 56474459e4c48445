import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from panorama_vlm.demo import default_model
from panorama_vlm.demo.default_model import draw, write_questions
from panorama_vlm.demo.default_model import main as ask_unseen
from panorama_vlm.evaluation.asking import Said
from panorama_vlm.evaluation.formats import read_items
from panorama_vlm.evaluation.items import Item
from panorama_vlm.evaluation.scores import right_answer
from panorama_vlm.places_panorama import BFoV
from panorama_vlm.synthetic.questions import KINDS
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ASK = ROOT / "demo" / "ask.py"


@pytest.mark.slow
def test_the_process_that_asks_needs_only_the_folder(make, tmp_path, samples):
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    two = tmp_path / "samples"
    two.mkdir()
    (two / "metadata.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples[3:5]))
    for name in {sample["file_name"] for sample in samples[3:5]}:
        shutil.copy(ASK.parent.parent / "samples" / name, two)
    command = [sys.executable, str(ASK), str(tmp_path / "model"), str(two), str(tmp_path / "answers.json")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [set(answer) for answer in answers] == [{"panorama", "question", "expected", "answer"}] * 2
    assert [answer["expected"] for answer in answers] == [sample["annotation"] for sample in samples[3:5]]


@pytest.fixture
def small_model(make, tmp_path):
    """A folder with a tiny random model."""
    for part in make():
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.soak
@pytest.mark.slow
def test_a_model_is_asked_every_kind_about_unseen_scenes_and_its_answers_are_counted(small_model, tmp_path, capsys):
    out = tmp_path / "out"
    ask_unseen(["--model", str(small_model), "--output", str(out), "--questions", "1"])
    said = capsys.readouterr().out
    answers = json.loads((out / "answers.json").read_text())
    rows = {row["file_name"]: row for row in map(json.loads, (out / "metadata.jsonl").read_text().splitlines())}
    assert [a["kind"] for a in answers] == [kind for row in rows.values() for kind in row["kinds"]]
    assert sorted(answer["kind"] for answer in answers) == sorted(KINDS)
    assert list(rows)[:2] == ["lab-1.jpg", "park-2.jpg"]
    for answer in answers:
        assert set(answer) - {"steps"} == {"panorama", "question", "expected", "answer", "kind", "right"}
        row = rows[answer["panorama"]]
        place = row["kinds"].index(answer["kind"])
        wanted = row["conversations"][2 * place + 1]["value"]
        assert row["questions"][place] in answer["question"]
        assert answer["expected"] == wanted or row["places"][place] is not None  # of a place, its numbers alone
        assert (out / answer["panorama"]).is_file()
    assert f"{sum(answer['right'] for answer in answers)} of {len(KINDS)}\n" in said
    assert said.count("  right  ") == sum(answer["right"] for answer in answers)
    assert "the same answer as with the package" in said
    assert Image.open(out / "views.png").width == 2048


class _Oracle:
    """Knows the answer to questions with an "of" in them, and says nothing to the others."""

    def __init__(self, *_):
        pass

    def __call__(self, batches):
        for batch in batches:
            yield [Said(right_answer(each.item) if "of" in each.item.question else "", steps="x") for each in batch]


def test_each_question_gets_its_own_answer_and_steps_are_apart(monkeypatch, tmp_path):
    write_questions(tmp_path, 1)
    items = read_items(tmp_path).items
    monkeypatch.setattr(default_model, "Answerer", _Oracle)
    answers = default_model.ask(None, None, items)
    assert [answer["right"] for answer in answers] == ["of" in item.question for item in items]
    assert {answer["steps"] for answer in answers} == {"x"}
    assert 0 < sum(answer["right"] for answer in answers) < len(answers)


def test_places_are_drawn_in_the_colours_of_expected_and_answered(tmp_path):
    Image.new("RGB", (512, 256)).save(tmp_path / "a.jpg")
    item = Item("1", "a.jpg", "Where?", ["[90, 0, 20, 20]"], panorama="a.jpg", places=[BFoV(90, 0, 20, 20)])
    draw(tmp_path, [item], [{"panorama": "a.jpg", "answer": "[-90, 0, 20, 20]", "right": False}])
    sheet = np.array(Image.open(tmp_path / "views.png"))[28:]
    lime, red = (np.argwhere((sheet == colour).all(-1)) for colour in ((0, 255, 0), (255, 0, 0)))
    assert lime.mean(0) == pytest.approx([128, 384], abs=2)
    assert red.mean(0) == pytest.approx([128, 128], abs=2)


def test_where_there_is_no_model_or_it_would_be_deleted_the_error_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        ask_unseen(["--model", str(tmp_path), "--output", str(tmp_path / "other")])
    assert exit.value.code == 2 and "there is no model in" in capsys.readouterr().err
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit):
        ask_unseen(["--model", str(tmp_path), "--output", str(tmp_path)])
    assert "would be deleted" in capsys.readouterr().err and (tmp_path / "config.json").is_file()


def test_another_answer_without_the_package_is_an_error(monkeypatch, tmp_path, capsys):
    def run(command, **_):
        Path(command[5]).write_text(json.dumps([{"answer": "no"}]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    one = {"panorama": "a.jpg", "question": "Is it?", "expected": "yes", "answer": "no"}
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    default_model.ask_without_the_package(tmp_path / "same", one)
    with pytest.raises(SystemExit, match="with the package the answer is 'yes'"):
        default_model.ask_without_the_package(tmp_path / "other", {**one, "answer": "yes"})


THREE_LINES = """
import sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "Is there a red cube around you?"}]
options = dict(tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1]:]
assert "panorama_vlm" not in sys.modules
print(processor.post_process_answer(output)[0].answer)
"""


@pytest.mark.slow
def test_the_root_of_the_repository_answers_without_the_package(tmp_path):
    command = [sys.executable, "-P", "-c", THREE_LINES, str(ROOT), str(ROOT / "samples" / "park.jpg")]
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] in ("yes", "no")
