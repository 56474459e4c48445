"""Faults of the machine and of numbers in the middle of a run: what is said, how soon, and what is left."""

import ctypes
import math
import os
import resource
import subprocess
import sys
import time

import psutil
import pytest
import torch
from panorama_vlm import PanoramaImageProcessor, PanoramaVLM
from panorama_vlm.tests.launching import ENVIRONMENT, command, run_here
from panorama_vlm.train.checkpoint import Checkpoints, NotWritten, newest_checkpoint


@pytest.mark.parametrize(
    ("kind", "stage", "where", "words"),
    [
        ("weights", "vision", "model.resampler", "Weights are not finite: model.resampler"),
        (
            "module",
            "resampler",
            "model.vision_tower",
            "It came up in the module model.vision_tower.encoder.layers.1.mlp",
        ),
        ("gradient", "resampler", "model.projection", "the norm of its gradient nan. All modules gave finite values"),
    ],
)
def test_what_is_not_finite_ends_the_run_with_step_samples_and_module(tmp_path, monkeypatch, kind, stage, where, words):
    from panorama_vlm.train import steps

    real = steps.OptimizerStep._step

    def spoilt(self, made, *others):
        if made.index == 2:
            if kind == "weights":
                next(self.plain.get_submodule(where).parameters()).data.view(-1)[0] = math.nan
            elif kind == "module":
                layer = self.plain.get_submodule(f"{where}.encoder.layers.1.mlp.fc1")
                layer.register_forward_hook(lambda _, __, output: output / 0)
            else:
                parameter = next(self.plain.get_submodule(where).parameters())
                parameter.register_hook(lambda gradient: gradient * math.nan)
            self.before = {name: value.clone() for name, value in self.plain.state_dict().items()}
        try:
            return real(self, made, *others)
        except FloatingPointError:
            after = self.plain.state_dict()
            assert all(torch.equal(after[n], v) or not v.isfinite().all() for n, v in self.before.items())
            raise

    monkeypatch.setattr(steps.OptimizerStep, "_step", spoilt)
    with pytest.raises(FloatingPointError) as raised:
        run_here(tmp_path, "--stage", stage, "--save_every", 2, "--eval_samples", 0)
    said = str(raised.value)
    assert f"step 3 of stage '{stage}'" in said and words in said, said
    assert said.partition("Samples of the step: ")[2].count(";") >= 3, said
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest.name.endswith("2")
    loaded = PanoramaVLM.from_checkpoint(newest)
    assert all(value.isfinite().all() for value in loaded.state_dict().values())


def started(output, *options, processes=1, **more):
    """A long run that has made its first steps, and where its words go."""
    asked = ["tiny.yaml", "--stage", "resampler", "--resampler.max_steps", "5000", "--output", output, *options]
    with (output.parent / "log").open("w") as log:
        run = subprocess.Popen(command(processes, *asked), stdout=log, stderr=log, env=ENVIRONMENT, **more)
    lines, begun = output / "logs/resampler/metrics.jsonl", time.monotonic()
    while not (lines.is_file() and len(lines.read_text().splitlines()) > 5) and time.monotonic() - begun < 120:
        assert run.poll() is None, (output.parent / "log").read_text()[-3000:]
        time.sleep(0.1)
    return run, output.parent / "log"


def ended(run, log, processes):
    """Seconds that all of them took to end, and what they said."""
    begun = time.monotonic()
    run.wait(120)
    _, left = psutil.wait_procs(processes, timeout=60)
    assert not left
    return time.monotonic() - begun, log.read_text()


def goes_on(output, *options):
    """Seconds until the same command has written its next checkpoint, and where it began."""
    begun, before = time.monotonic(), newest_checkpoint(output / "checkpoints")
    run, log = started(output, *options)
    while newest_checkpoint(output / "checkpoints") == before and time.monotonic() - begun < 120:
        time.sleep(0.2)
    run.terminate()
    run.wait(60)
    step = int(before.name[-7:])
    assert f"Going on from step {step} of stage resampler" in log.read_text()
    return time.monotonic() - begun


@pytest.mark.soak
def test_when_one_process_of_two_is_killed_the_other_ends_with_a_message(tmp_path, record_property):
    run, log = started(tmp_path / "run", processes=2)
    children = psutil.Process(run.pid).children(recursive=True)
    trainers = [child for child in children if "RANK" in child.environ()]
    trainers[-1].kill()
    seconds, words = ended(run, log, trainers)
    assert seconds < 60 and run.returncode != 0 and "Signal 9 (SIGKILL)" in words
    assert newest_checkpoint(tmp_path / "run/checkpoints") is not None
    record_property("soak", ("a process of two killed", 1, "steps since the last checkpoint", seconds))


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2])
def test_when_a_worker_is_killed_the_run_ends_with_a_message_and_goes_on(tmp_path, record_property, workers):
    options = ("--num_workers", workers, "--save_every", 3)
    run, log = started(tmp_path / "run", *options)
    (trainer,) = [p for p in psutil.Process(run.pid).children() if "panorama_vlm.train" in " ".join(p.cmdline())]
    of_data = [child for child in trainer.children() if "panorama_vlm.train" in " ".join(child.cmdline())]
    assert len(of_data) == workers
    of_data[-1].kill()
    seconds, words = ended(run, log, [trainer, *of_data])
    assert seconds < 60 and "error: a data worker was ended by signal 9" in words, words[-3000:]
    seconds += goes_on(tmp_path / "run", *options)
    record_property("soak", ("a data worker killed", 1, "steps since the last checkpoint", seconds))


@pytest.mark.slow
def test_a_disk_that_fills_while_saving_costs_that_checkpoint_alone(tmp_path, monkeypatch, record_property):
    """A limit on the size of a file stands for the disk: writing beyond it fails as on a full one."""
    whole = run_here(tmp_path / "whole", "--stage", "resampler", "--save_every", 2)["resampler"]
    real, before = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(self, step, *others):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        return real(self, step, *others)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fills)
        try:
            with pytest.raises(
                NotWritten, match=r"cannot write '.*resampler-0000004'.*What was written before is whole"
            ):
                run_here(output, "--stage", "resampler", "--save_every", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["resampler-0000002"]
    begun = time.monotonic()
    assert run_here(output, "--stage", "resampler", "--save_every", 2)["resampler"] == whole[2:]
    files = [tmp_path / name / "resampler/model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    seconds = time.monotonic() - begun
    record_property("soak", ("disk full while saving", 1, "steps since the last checkpoint", seconds))


def unprivileged():
    """Permissions hold for root, too, after the next exec (PR_CAPBSET_DROP of CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


@pytest.mark.soak
@pytest.mark.parametrize("which", ["output", "checkpoints", "cache", "home"])
def test_folders_that_cannot_be_written_are_named(tmp_path, which, record_property):
    output, locked = tmp_path / "run", tmp_path / which
    options = ["tiny.yaml", "--stage", "resampler", "--eval_samples", "0", "--output", output]
    environment = ENVIRONMENT
    if which == "output":
        locked = output
    elif which == "checkpoints":
        locked = output / which
    elif which == "cache":
        options += ["--cache_dir", locked]
    else:
        environment = {**ENVIRONMENT, "HOME": str(locked), "HF_HOME": str(locked / "hf"), "XDG_CACHE_HOME": str(locked)}
        environment.pop("HF_DATASETS_CACHE", None)
    locked.mkdir(parents=True)
    locked.chmod(0o555)
    try:
        asked = [sys.executable, "-m", "panorama_vlm.train", *map(str, options)]
        done = subprocess.run(asked, capture_output=True, text=True, env=environment, preexec_fn=unprivileged)
    finally:
        locked.chmod(0o755)
    assert "Traceback" not in done.stderr
    if which == "cache":
        assert done.returncode == 0 and f"cannot keep prepared views in cache_dir='{locked}'" in done.stderr
    else:
        assert done.returncode == 2 and "error: cannot " in done.stderr and str(locked) in done.stderr, done.stderr
    record_property("soak", ("folder that cannot be written", 1, "nothing", 0.0))


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(panoramas, tmp_path):
    """It made every panorama of a run unreadable, and a full disk left half a file of each."""
    (tmp_path / "file").write_text("in the way")
    plain = PanoramaImageProcessor(image_size=32)(panoramas[0], return_tensors="pt")["pixel_values"]
    with pytest.warns(UserWarning, match="cannot keep prepared views in cache_dir="):
        kept = PanoramaImageProcessor(image_size=32, cache_dir=tmp_path / "file")(panoramas[0], return_tensors="pt")
    assert (kept["pixel_values"] - plain).abs().max() < 0.01
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.warns(UserWarning, match="cannot keep prepared views"):
            PanoramaImageProcessor(image_size=32, cache_dir=tmp_path / "full")(panoramas[0], return_tensors="pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]
