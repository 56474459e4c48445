"""Command line of the trainer: `accelerate launch -m panorama_vlm.train [CONFIG.yaml] [--option value ...]`."""

from __future__ import annotations

import logging
import sys

from .config import describe, load_config
from .data import TooManyBadSamples
from .loop import PREEMPTED, Preempted, train


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(describe())
        return
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "datasets", "PIL", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("accelerate.utils.other").setLevel(
        logging.ERROR
    )  # that tied weights are saved once is as it should
    try:
        train(load_config(arguments))
    except (ValueError, TooManyBadSamples, FloatingPointError) as error:
        logging.getLogger(__name__).debug("Where it happened", exc_info=True)
        sys.exit(f"error: {error}")
    except Preempted as stopped:
        print(f"{stopped}; start the same command again to go on (exit status {PREEMPTED})", file=sys.stderr)
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    main()
