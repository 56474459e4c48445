"""The command that asks a model."""

import subprocess
import sys

import pytest
from panorama_vlm.ask import answer, question
from panorama_vlm.tests.launching import ENVIRONMENT, SAMPLES


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
