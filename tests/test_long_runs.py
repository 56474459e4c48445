"""Thousands of steps and requests: what is held stays what it is."""

import gc
import subprocess
import time

import numpy as np
import psutil
import pytest
from panorama_vlm.tests.launching import ENVIRONMENT, command, run_here
from transformers import pipeline

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
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
def test_one_seed_gives_the_same_weights_in_a_fresh_process_and_home(tmp_path, processes):
    """All three stages; what a machine has besides, its home, its hash seed and its place for files, is another."""
    weights = []
    for name in ("a", "b"):
        home = tmp_path / name / "home"
        home.mkdir(parents=True)
        own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(home), "PYTHONHASHSEED": str(len(weights))}
        asked = command(processes, "tiny.yaml", "--output", tmp_path / name / "run")
        subprocess.run(asked, check=True, capture_output=True, env={**ENVIRONMENT, **own})
        files = sorted((tmp_path / name / "run").glob("*/*.safetensors"))
        weights.append({file.parent.name + file.name: file.read_bytes() for file in files})
    assert len(weights[0]) >= 3 and weights[0] == weights[1]
