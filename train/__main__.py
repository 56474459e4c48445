"""Command line of the trainer: `accelerate launch -m panorama_vlm.train [CONFIG.yaml] [--option value ...]`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path

import datasets
from transformers.utils import logging as transformers_logging

from ..data.skipped import TooManyBadSamples
from .config import describe, load_config
from .feed import WorkerLost
from .launching import start_processes
from .loop import train
from .signals import PREEMPTED, Preempted


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(describe())
        return
    start_processes("panorama_vlm.train", arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()  # one bar a stage is enough
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")  # peft asks for it
    for noisy in ("httpx", "datasets", "PIL", "accelerate", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("accelerate.utils.other").setLevel(
        logging.ERROR
    )  # that tied weights are saved once is as it should
    try:
        config = load_config(arguments)
        train(config)
    except (ValueError, OSError, TooManyBadSamples, FloatingPointError, WorkerLost) as error:
        logging.getLogger(__name__).debug("Where it happened", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as stopped:
        print(f"{stopped}; start the same command again to go on (exit status {PREEMPTED})", file=sys.stderr)
        sys.exit(PREEMPTED)
    if os.environ.get("RANK", "0") == "0" and config.stages[-1] != "vision":
        folder = shlex.quote(str(Path(config.output, config.stages[-1])))
        print(f'Ask it: python -m panorama_vlm.ask {folder} PANORAMA.jpg "What is behind me?"', file=sys.stderr)


if __name__ == "__main__":
    main()
