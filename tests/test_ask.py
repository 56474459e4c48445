"""The command that asks a model."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from panorama_vlm import PanoramaVLM
from panorama_vlm.ask import answer, main, question
from panorama_vlm.tests.launching import ENVIRONMENT, SAMPLES
from PIL import Image


def test_an_answer_is_what_generate_says(make, ask, panoramas):
    model, processor = make()
    inputs = ask(processor, panoramas[0], "Where is the sun?")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    words = answer(model, processor, question(panoramas[0], "Where is the sun?"), max_new_tokens=5)
    assert words == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


@pytest.mark.slow
def test_the_command_prints_the_answer_and_nothing_else(make, tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "panorama_vlm.ask", str(tmp_path)]
    park = str(SAMPLES / "park.jpg")
    run = subprocess.run([*command, park, "Where", "is", "it?"], capture_output=True, text=True, env=ENVIRONMENT)
    expected = answer(model, processor, question(park, "Where is it?"))
    assert (run.returncode, run.stdout.strip()) == (0, expected), run.stderr[-2000:]
    assert not run.stderr
    for wrong in ([*command, "none.jpg", "q"], [*command[:-1], "no-model", park, "q"]):
        run = subprocess.run(wrong, capture_output=True, text=True, env=ENVIRONMENT)
        assert run.returncode == 2 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr


def run(*arguments):
    """The command in this process."""
    main([str(each) for each in arguments])


@pytest.fixture
def folder(make, tmp_path):
    for part in make():
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_things_are_pointed_at_and_their_places_saved(folder, tmp_path, capsys, monkeypatch):
    answers = {"Where": "[30, -10, 20, 12]", "List": "[[1, 2, 30, 4], [-170, 0, 30, 8]]", "What": "a tree"}

    def generate(self, input_ids, tokenizer=None, **_):
        (prompt,) = tokenizer.batch_decode(input_ids)
        text = next(says for word, says in answers.items() if word in prompt)
        return SimpleNamespace(text=[text], generated_ids=input_ids[:, :2])

    monkeypatch.setattr(PanoramaVLM, "generate", generate)
    park, out = SAMPLES / "park.jpg", tmp_path / "out"
    out.mkdir()
    names = ("a.pannellum.json", "a.psv.json", "a.geojson", "a.coco.json", "a.jpg", "a.png", "crops/")
    files = [f"{out}/{name}" for name in names]
    position = ("--position", -33.9, 151.2, "--heading", 90)
    run(folder, park, "--detect", "</script>", "--save", *files, *position, "--reach", 50)
    assert capsys.readouterr().out == "</script>: [1, 2, 30, 4]\n</script>: [-170, 0, 30, 8]\n"
    texts = [Path(file).read_text() for file in files[:4]]
    assert not any("<" in text for text in texts)
    pannellum, viewer, places, coco = map(json.loads, texts)
    assert [spot["yaw"] for spot in pannellum["hotSpots"]] == [1, -170] and pannellum["panorama"] == str(park)
    assert viewer["markers"][0]["data"]["label"] == coco["categories"][0]["name"] == "</script>"
    assert [each["properties"]["bearing"] for each in places["features"]] == [91, 280]
    assert {each["geometry"]["type"] for each in places["features"]} == {"LineString"}
    assert Image.open(files[4]).size == Image.open(park).size
    assert sorted(path.name for path in (out / "crops").iterdir()) == ["01-script.jpg", "02-script.jpg"]

    run(folder, park, "--point", "red cube", "dog", "--look-twice")
    assert capsys.readouterr().out == "red cube: [30, -10, 20, 12]\ndog: [30, -10, 20, 12]\n"
    run(folder, park, "--describe", 2)
    assert capsys.readouterr().out == "front (0°): a tree\nback (180°): a tree\n"
    run(folder, park, "Where", "is", "it?", "--save", files[0])
    assert capsys.readouterr().out == "[30, -10, 20, 12]\n"
    assert json.loads(Path(files[0]).read_text())["hotSpots"][0]["pitch"] == -10
    run(folder, park, "What", "is", "it?", "--headings", 4, "--no-turn-words")
    assert capsys.readouterr().out == "a tree (4 of 4)\n"
    answers["Where"] = "nowhere"
    run(folder, park, "--point", "dog")
    assert capsys.readouterr().out == "[]\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "ask a question, or one of --point, --detect and --describe"),
        (["Who?", "--point", "cat"], "ask a question, or one of"),
        (["--point", "cat", "--detect", "cat"], "not allowed with"),
        (["--describe", "--save", "a.geojson"], "--describe finds no places"),
        (["--point", "cat", "--save", "a.csv"], "names that end in .pannellum.json"),
        (["--point", "cat", "--save", "a.geojson"], "no position and heading: hand it over"),
        (["--describe", "0"], "directions must be positive, got 0"),
        (["--describe", "--headings", "2"], "--describe finds no places"),
        (["Who?", "--headings", "4"], "turn_words must be given"),
        (["Who?", "--turn-words"], "give --headings, too"),
        (["--describe", "--no-turn-words"], "give --headings, too"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        run(folder, SAMPLES / "park.jpg", *arguments, "--max-new-tokens", 2)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and "Traceback" not in error
