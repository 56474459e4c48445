"""Runs of the trainer, for tests of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from panorama_vlm.train.config import load_config
from panorama_vlm.train.loop import train

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(processes, *arguments):
    """The trainer on some processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launcher, "-m", "panorama_vlm.train", *map(str, arguments)]


def launch(*arguments, processes=1):
    return subprocess.run(command(processes, *arguments), capture_output=True, text=True, env=ENVIRONMENT)


def run_here(output, *arguments):
    """Train in this process."""
    return train(load_config(["tiny.yaml", "--output", str(output), *map(str, arguments)]))


def metrics(output, stage, name="loss"):
    lines = (Path(output) / "logs" / stage / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]
