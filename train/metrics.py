"""What a run says while it trains: `metrics.jsonl`, the trackers, and how fast it is."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from .stage import Stage

logger = logging.getLogger(__name__)

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_SHOWN = ("loss", "grad_norm", "retrieval", "effective_rank", "skipped_steps", "panoramas_per_second", "waiting")


class Metrics:
    """The log of a stage, written by the main process.

    Args:
        stage: that is trained.
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        self.clock = Clock(0.0)

    def rewind(self, step: int, seconds: float) -> None:
        """Forget what was logged after a step, and go on counting from there.

        Args:
            step: the last one that counts.
            seconds: that the stage was trained for up to there.
        """
        self.clock = Clock(seconds)
        if self.stage.is_main:
            self.stage.logs.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, SAMPLES):
                _truncate(self.stage.logs / name, step)

    def log_step(self, step: int, figures: dict[str, float], rates: dict[str, float]) -> None:
        """The figures of a step, and its learning rates by part of the model."""
        line = {**figures, **{f"learning_rate/{part}": rate for part, rate in rates.items()}}
        self._write(step, line, {name: line[name] for name in _SHOWN if name in line})

    def log_results(self, step: int, results: dict[str, float]) -> None:
        """What an evaluation gave."""
        self._write(step, results, results)

    def log_answers(self, step: int, answers: list[dict[str, Any]]) -> None:
        """Answers to sample questions."""
        if self.stage.is_main:
            for answer in answers:
                _append(self.stage.logs / SAMPLES, {"step": step, **answer})

    def _write(self, step: int, line: dict[str, float], shown: dict[str, float]) -> None:
        if self.stage.is_main:
            written = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
            _append(self.stage.logs / METRICS, {"stage": self.stage.name, "step": step, **written})
            logger.info("step %d: %s", step, " ".join(f"{name}={value:.4g}" for name, value in shown.items()))
        if self.stage.config.trackers:
            named = {f"{self.stage.name}/{name}": value for name, value in line.items()}
            self.stage.accelerator.log(named, step=step)


class Clock:
    """Throughput since the last log line.

    Args:
        seconds_before: that the stage was trained for already.
    """

    def __init__(self, seconds_before: float):
        self.before, self.begin = seconds_before, time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.since, self.waited, self.tokens, self.panoramas, self.steps = time.perf_counter(), 0.0, 0.0, 0.0, 0

    @property
    def seconds(self) -> float:
        """Of training, over all resumptions."""
        return self.before + time.perf_counter() - self.begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def count(self, figures: dict[str, float]) -> None:
        """Take in what a step has used up."""
        self.tokens += figures["tokens"]
        self.panoramas += figures["panoramas"]
        self.steps += 1

    def rates(self) -> dict[str, float]:
        """Tokens and panoramas a second, the share of the time spent waiting for data, GiB of memory."""
        passed = time.perf_counter() - self.since
        rates = {"tokens_per_second": self.tokens / passed, "panoramas_per_second": self.panoramas / passed}
        rates |= {"seconds_per_step": passed / self.steps, "waiting": self.waited / passed}
        if torch.cuda.is_available():
            rates["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            rates["memory_gib"] = _peak_memory() / 2**30
        self._reset()
        return rates


def _peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line, without one that was cut off when the run was killed."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after a step."""
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
