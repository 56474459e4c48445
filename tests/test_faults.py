"""Faults of the machine and of numbers in the middle of a run: what is said, how soon, and what is left."""

import copy
import ctypes
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import DistributedType
from panorama_vlm import PanoramaImageProcessor, PanoramaVLM
from panorama_vlm.tests.launching import ENVIRONMENT, command, run_here
from panorama_vlm.train import loop
from panorama_vlm.train.checkpoint import Checkpoints, NotWritten, newest_checkpoint
from panorama_vlm.train.checks import check_run
from panorama_vlm.train.config import load_config
from panorama_vlm.train.push_process import _seconds_to_wait


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

    real = steps.OptimizerStep.__call__

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

    monkeypatch.setattr(steps.OptimizerStep, "__call__", spoilt)
    with pytest.raises(FloatingPointError) as raised:
        run_here(tmp_path, "--stage", stage, "--save_every", 2, "--eval_samples", 0)
    said = str(raised.value)
    assert f"step 3 of stage '{stage}'" in said and words in said, said
    assert said.partition("Samples of the step: ")[2].count(";") >= 3, said
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest.name.endswith("2")
    loaded = PanoramaVLM.from_checkpoint(newest)
    assert all(value.isfinite().all() for value in loaded.state_dict().values())


def spoil(monkeypatch, which, where="model.projection"):
    """Gradients are NaN in these steps, counted from 0."""
    from panorama_vlm.train import steps

    real = steps.OptimizerStep.__call__

    def spoilt(self, made, *others):
        spoils = lambda gradient: gradient * math.nan if made.index in which else gradient  # noqa: E731
        hook = next(self.plain.get_submodule(where).parameters()).register_hook(spoils)
        figures = real(self, made, *others)
        hook.remove()
        return figures

    monkeypatch.setattr(steps.OptimizerStep, "__call__", spoilt)


def lines_of(output, stage="resampler"):
    return [json.loads(line) for line in (output / "logs" / stage / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_is_skipped_as_if_it_had_not_been(tmp_path, monkeypatch, caplog):
    """Weights, optimizer, schedule and random numbers, through accumulated micro-batches."""
    from panorama_vlm.train import steps

    seen = {}
    spoil(monkeypatch, {2})
    real = steps.OptimizerStep.__call__

    def watched(self, made, *others):
        figures = real(self, made, *others)
        state = self.plain.state_dict(), self.optimizer.state_dict()["state"], self.schedule.state_dict()
        seen[made.index] = copy.deepcopy(state)
        assert all(parameter.grad is None for parameter in self.trained)
        return figures

    monkeypatch.setattr(steps.OptimizerStep, "__call__", watched)
    options = ["--stage", "finetune", "--options.finetune_vision_tower", "true", "--finetune.max_steps", 4]
    losses = run_here(tmp_path, *options, "--eval_samples", 0, "--max_skipped_steps", 1)["finetune"]
    assert len(losses) == 4 and np.isfinite(losses).all()
    torch.testing.assert_close(seen[2], seen[1], rtol=0, atol=0)
    assert seen[3][2]["last_epoch"] == 3
    assert [line["skipped_steps"] for line in lines_of(tmp_path, "finetune")] == [0, 0, 1, 1]
    assert lines_of(tmp_path, "finetune")[2]["grad_norm"] is None
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Skipped step")]
    assert "step 3 of stage 'finetune'" in said and "the norm of its gradient nan" in said
    assert said.partition("Samples of the step: ")[2].count(";") >= 7, said
    assert "| skipped steps |" in (tmp_path / "finetune/README.md").read_text()


def test_steps_that_are_not_finite_end_the_run_where_they_are_too_many_in_a_row(tmp_path, monkeypatch, caplog):
    """And the count goes on where the run goes on: what was written in between is good."""
    spoil(monkeypatch, {0, 2, 3, 4})
    options = ["--stage", "resampler", "--eval_samples", 0, "--save_every", 2]
    said = (
        r"step 5 of stage 'resampler'.*2 steps before it were skipped \(max_skipped_steps=2\).*the last checkpoint is"
    )
    with pytest.raises(FloatingPointError, match=said):
        run_here(tmp_path, *options, "--max_skipped_steps", 2)
    assert [line["skipped_steps"] for line in lines_of(tmp_path)] == [1, 1, 2, 3]
    checkpoints = {path.name[-1]: PanoramaVLM.from_checkpoint(path) for path in (tmp_path / "checkpoints").iterdir()}
    torch.testing.assert_close(checkpoints["4"].state_dict(), checkpoints["2"].state_dict(), rtol=0, atol=0)
    with pytest.raises(FloatingPointError, match=said):
        run_here(tmp_path, *options, "--max_skipped_steps", 2)
    losses = run_here(tmp_path, *options, "--max_skipped_steps", 3)["resampler"]
    assert len(losses) == 2 and [line["skipped_steps"] for line in lines_of(tmp_path)] == [1, 1, 2, 3, 4, 4]


def test_a_run_that_skipped_steps_and_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    spoil(monkeypatch, {1, 3})
    options = ["--max_skipped_steps", 1, "--options.lora_dropout", 0.3]
    run_here(tmp_path / "whole", "--stage", "finetune", *options)
    for step in (2, 3):  # after one that was skipped, and before one
        with monkeypatch.context() as patch:
            stops = loop._StageRun._log

            def stop(self, figures, epoch, step=step, stops=stops):
                stops(self, figures, epoch)
                if self.step == step:
                    self._save()
                    raise KeyboardInterrupt

            patch.setattr(loop._StageRun, "_log", stop)
            with pytest.raises(KeyboardInterrupt):
                run_here(tmp_path / "run", "--stage", "finetune", *options)
    run_here(tmp_path / "run", "--stage", "finetune", *options)
    files = [tmp_path / name / "finetune/model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert lines_of(tmp_path / "run", "finetune")[-1]["skipped_steps"] == 2


SPOILT = """
import hashlib, json, sys, torch
from panorama_vlm.train import __main__, steps

real = steps.OptimizerStep.__call__

def spoilt(self, made, *others):
    layer = self.plain.model.resampler.get_submodule("layers.1")
    divide = lambda _, __, output: output / (0 if made.index == 1 and self.accelerator.is_last_process else 1)
    hook = layer.register_forward_hook(divide)
    figures = real(self, made, *others)
    hook.remove()
    state = b"".join(value.numpy().tobytes() for value in self.plain.state_dict().values())
    line = [self.accelerator.process_index, made.index, hashlib.sha256(state).hexdigest()]
    with open(OUTPUT, "a") as file:
        file.write(json.dumps(line) + "\\n")
    return figures

steps.OptimizerStep.__call__ = spoilt
__main__.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_two_processes_skip_alike_what_is_not_finite_in_one(tmp_path, joint):
    """Also where the overlap loss takes its statistics from both."""
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT.replace("OUTPUT", repr(str(tmp_path / "weights"))))
    asked = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    asked += ["tiny.yaml", "--stage", "vision", "--vision.max_steps", "3", "--max_skipped_steps", "1"]
    asked += ["--options.vicreg_mode", "batchwise", "--options.vicreg_use_ddp_gather", str(joint).lower()]
    asked += ["--vision.accumulation", "2", "--vision.batch_size", "1", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        asked, capture_output=True, text=True, env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    of_each = sorted(map(json.loads, (tmp_path / "weights").read_text().splitlines()))
    first, second = ([digest for rank, _, digest in of_each if rank == process] for process in (0, 1))
    assert first == second and len(set(first)) == 2 and first[1] == first[0]
    assert [line["skipped_steps"] for line in lines_of(tmp_path / "run", "vision")] == [0, 1, 1]
    assert done.stderr.count("Skipped step 2 of stage 'vision': the loss is nan") == 1
    assert "It came up in the module model.resampler.layers.1" in done.stderr
    assert done.stderr.partition("Samples of the step: ")[2].splitlines()[0].count(";") == 2  # of the one alone


def test_statistics_of_batchnorm_are_those_before_a_step_that_is_skipped(tmp_path, monkeypatch):
    tower = "{model_type: resnet, num_channels: 3, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], "
    tower += "layer_type: basic, image_size: 32}"
    spoil(monkeypatch, {1})
    asked = [
        "--stage",
        "finetune",
        "--compose.vision",
        tower,
        "--options.image_size",
        64,
        "--options.finetune_vision_tower",
        "true",
    ]
    asked += ["--save_every", 1, "--eval_samples", 0, "--finetune.max_steps", 2, "--max_skipped_steps", 1]
    run_here(tmp_path, *asked)
    states = [PanoramaVLM.from_checkpoint(p).state_dict() for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert any("running_mean" in name for name in states[0])
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    """The last step of a stage made them so, and the folder of the stage said nothing of it."""
    from panorama_vlm.train import steps

    real = steps.OptimizerStep.__call__

    def spoilt(self, made, *others):
        figures = real(self, made, *others)
        if made.index == 3:
            next(self.plain.model.resampler.parameters()).data.view(-1)[0] = math.inf
        return figures

    monkeypatch.setattr(steps.OptimizerStep, "__call__", spoilt)
    for last, every in ((4, 100), (6, 4)):
        output = tmp_path / str(last)
        asked = ["--stage", "vision", "--vision.max_steps", last, "--save_every", every, "--max_skipped_steps", 3]
        with pytest.raises(
            FloatingPointError, match="after step 4 of stage 'vision' weights are not finite.*resampler"
        ):
            run_here(output, *asked)
        assert not (output / "vision").exists() and not list(output.glob("checkpoints/*"))


def test_an_evaluation_that_is_not_finite_is_not_the_best(tmp_path, monkeypatch, caplog):
    """It was: no later loss is less than NaN."""
    results = iter([math.nan, 2.0, 3.0])
    monkeypatch.setattr("panorama_vlm.train.evaluate.Evaluator._validate", lambda _: {"eval_loss": next(results)})
    asked = ["--stage", "vision", "--vision.max_steps", 3, "--validation_share", 0.2, "--eval_every", 1]
    run_here(tmp_path, *asked, "--save_every", 1, "--keep_checkpoints", 1)
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["2", "3"]
    assert "Step 1 of stage vision: the evaluation is not finite." in caplog.text
    assert [line["eval_loss"] for line in lines_of(tmp_path, "vision") if "eval_loss" in line] == [None, 2, 3]


def test_skipping_steps_is_refused_where_it_cannot_be(monkeypatch):
    deepspeed = SimpleNamespace(num_processes=2, gradient_accumulation_steps=1)
    deepspeed.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="max_skipped_steps is 2, and DeepSpeed"):
        check_run(load_config(["tiny.yaml", "--max_skipped_steps", "2"]), deepspeed)
    for value in (-1, 1.5, math.nan, True, "2"):
        config = load_config(["tiny.yaml"])
        config.max_skipped_steps = value
        with pytest.raises(ValueError, match=f"max_skipped_steps must be .*, got {value!r}"):
            config.check()


# The clock


def test_a_clock_that_jumps_an_hour_changes_nothing(tmp_path, monkeypatch):
    """Back and ahead at every look at it, in a run that is stopped and goes on; the files of its older checkpoint are
    the newer ones by the clock."""
    options = ["--stage", "resampler", "--save_every", 2, "--eval_samples", 0]
    losses = run_here(tmp_path / "whole", *options)["resampler"]
    jumps, real = itertools.cycle([0, 3600, -3600, 7200]), time.time

    def jumping():
        return real() + next(jumps)

    for name in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(name, jumping)
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stops = loop._StageRun._save
        patch.setattr(loop._StageRun, "_save", lambda self: stops(self) if self.step < 6 else interrupt())
        with pytest.raises(KeyboardInterrupt):
            run_here(output, *options)
    for path in (output / "checkpoints").glob("resampler-0000002/**/*"):
        os.utime(path, (real() + 3600, real() + 3600))
    os.utime(output / "checkpoints/resampler-0000002", (real() + 3600, real() + 3600))
    assert newest_checkpoint(output / "checkpoints").name == "resampler-0000004"
    assert run_here(output, *options)["resampler"] == losses[4:]
    files = [tmp_path / name / "resampler/model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for line in lines_of(output):
        assert 0 < line["seconds_per_step"] < 60 and 0 <= line["waiting"] <= 1 and line["panoramas_per_second"] > 0
    assert not re.search(r"\d+ h", (output / "resampler/README.md").read_text())


def interrupt():
    raise KeyboardInterrupt


def test_a_push_waits_as_long_as_the_server_says_whatever_the_clock_here_says(monkeypatch):
    said = {"Date": "Wed, 21 Oct 2026 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT"}
    for jump in (-3600, 0, 3600):
        now = datetime(2026, 10, 21, 7, 28, tzinfo=UTC).timestamp() + jump
        monkeypatch.setattr("time.time", lambda now=now: now)
        assert _seconds_to_wait(said) == 30
    assert _seconds_to_wait({"Retry-After": "12"}) == 12
    assert _seconds_to_wait({"Retry-After": "\u00b2"}) == _seconds_to_wait({"Retry-After": "soon", "Date": "x"}) == 0


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


TRIES = """
import pytest
from hypothesis import strategies as st
from panorama_vlm.tests.properties import few, holds

soak = pytest.mark.soak

@few(3, 70)
@pytest.mark.parametrize("limit", [0, 10**9])
def test_numbers_are_small(limit, examples, record_property):
    def check(number):
        assert limit == 0 or abs(number) < 1
    holds(check, st.integers(), examples, record_property)

@soak
def test_two_faults(record_property):
    record_property("soak", ("fault", 2, "a step", 1.25))

@soak
def test_what_is_tried_and_fails(record_property):
    record_property("soak", ("fault that loses something", 3, "a step", 0.0))
    raise AssertionError

@pytest.fixture
def broken():
    raise OSError

@soak
def test_of_a_fixture(broken): ...

@soak
@pytest.mark.skip
def test_elsewhere(): ...
"""


def test_the_table_of_what_was_tried_counts_what_was_and_shows_what_failed(tmp_path):
    """A case that failed, one that broke and one that did not run; how many were tried is counted, not asked for."""
    (tmp_path / "test_tries.py").write_text(TRIES)
    asked = [sys.executable, "-P", "-m", "pytest", "-p", "panorama_vlm.tests.conftest", "-m", "soak", str(tmp_path)]
    done = subprocess.run([*asked, "--rootdir", str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT)
    rows = [line.strip("| ").split(" | ")[:3] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert done.returncode == 1 and rows == [
        ["numbers are small", "70", "nothing"],
        ["fault", "2", "a step"],
        ["numbers are small", rows[2][1], "**FAILED**"],
        ["fault that loses something", "3", "**FAILED**"],
        ["of a fixture", "1", "**FAILED**"],
        ["elsewhere", "1", "not tried"],
    ], done.stdout
    assert int(rows[2][1]) < 70
