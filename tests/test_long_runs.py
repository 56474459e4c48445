"""Thousands of steps and requests: what is held stays what it is."""

import gc
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from panorama_vlm.tests.launching import ENVIRONMENT, command, run_here
from transformers import pipeline

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parent.parent
GROWTH = 0.02  # of the memory held after warming up


def is_flat(held, handles):
    """Memory [bytes] and handles, one a step: growth from the quarter after the first to the last quarter."""
    parts = [float(np.median(part)) for part in np.array_split(held, 4)]
    growth = parts[3] / parts[1] - 1
    print(f"{parts[3] / 2**20:.0f} MiB, growth {growth:.2%}, handles {handles[len(handles) // 4]} to {handles[-1]}")
    assert growth < GROWTH and max(handles[len(handles) // 2 :]) <= max(handles[: len(handles) // 2])
    return growth


@pytest.mark.parametrize("workers", [0, 1])
def test_two_thousand_steps_hold_no_more_than_the_first(tmp_path, monkeypatch, record_property, workers):
    from panorama_vlm.train import steps

    process, held, handles = psutil.Process(), [], []
    real = steps.OptimizerStep.__call__

    def measured(self, *others):
        held.append(process.memory_info().rss + sum(child.memory_info().rss for child in process.children()))
        handles.append(process.num_fds())
        return real(self, *others)

    monkeypatch.setattr(steps.OptimizerStep, "__call__", measured)
    begun = time.monotonic()
    options = ["--stage", "finetune", "--finetune.max_steps", 2000, "--finetune.accumulation", 1, "--eval_every", 500]
    losses = run_here(tmp_path, *options, "--save_every", 250, "--log_every", 20, "--num_workers", workers)["finetune"]
    growth = is_flat(held, handles)
    assert len(losses) == len(held) == 2000 and np.isfinite(losses).all()
    record_property(
        "soak", (f"training steps, {workers} workers", 2000, f"memory {growth:+.1%}", time.monotonic() - begun)
    )


def test_two_thousand_requests_hold_no_more_than_the_first(make, panoramas, samples, tmp_path, record_property):
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    asked = pipeline("image-text-to-text", model=str(tmp_path), trust_remote_code=True)
    process, held, handles, begun = psutil.Process(), [], [], time.monotonic()
    for number in range(2000):
        picture = panoramas[number % 6].resize((64 + number % 7 * 32, 32 + number % 7 * 16))
        words = samples[number % len(samples)]["query"] * (1 + number % 3)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": words}]
        answer = asked(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
        assert isinstance(answer[0]["generated_text"], str)
        held.append(process.memory_info().rss)
        handles.append(process.num_fds())
    gc.collect()
    growth = is_flat(held, handles)
    record_property("soak", ("requests to a pipeline", 2000, f"memory {growth:+.1%}", time.monotonic() - begun))


@pytest.mark.parametrize("processes", [1, 2])
def test_one_seed_gives_the_same_weights_on_what_stands_for_another_machine(
    tmp_path, tmp_path_factory, record_property, processes
):
    """All three stages, in a fresh process and home, from a copy of the code in another folder, begun elsewhere; hash
    seed, time zone, language, permissions of new files and the number of data workers are others, too."""
    begun, weights = time.monotonic(), []
    own = [
        {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C.UTF-8"},
        {"PYTHONHASHSEED": "4242", "TZ": "Pacific/Chatham", "LC_ALL": "C", "PYTHONUTF8": "0", "LANGUAGE": "de"},
    ]
    for name, variables, umask, workers in zip("ab", own, (0o022, 0o077), (0, 2), strict=True):
        home, place = tmp_path / name / "home", tmp_path / name / ("x" * len(weights) + "place of code")
        home.mkdir(parents=True)
        short = tmp_path_factory.mktemp(name)  # sockets of data workers lie in it
        shutil.copytree(ROOT, place / "panorama_vlm", ignore=shutil.ignore_patterns(".*", "build", "*.safetensors"))
        variables |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(short), "PYTHONPATH": str(place)}
        asked = command(processes, "tiny.yaml", "--output", tmp_path / name / "run", "--num_workers", workers)
        asked += ["--validation_share", "0.2"]  # what it keeps followed from the folder of the data
        asked.insert(1, "-P")
        environment = {**ENVIRONMENT, "PYTHONCOERCECLOCALE": "0", **variables}
        done = subprocess.run(asked, capture_output=True, text=True, env=environment, cwd=home, umask=umask)
        assert done.returncode == 0, done.stderr[-3000:]
        assert str(place) in (tmp_path / name / "run/vision/training.json").read_text()  # the code that was copied
        files = sorted((tmp_path / name / "run").glob("*/*.safetensors"))
        weights.append({file.parent.name + file.name: file.read_bytes() for file in files})
    assert len(weights[0]) >= 3 and weights[0] == weights[1]
    kind = f"one seed on what stands for another machine, {processes} process{'es' * (processes > 1)}"
    record_property("soak", (kind, 2, "nothing", time.monotonic() - begun))
