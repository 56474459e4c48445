"""Command line of the trainer."""

from __future__ import annotations

import logging
import sys

from transformers import HfArgumentParser

from .config import TrainConfig
from .loop import train


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    (config,) = HfArgumentParser(TrainConfig, prog="python -m panorama_vlm.train").parse_args_into_dataclasses(
        arguments
    )
    try:
        config.check()
    except ValueError as error:
        sys.exit(f"error: {error}")
    train(config)


if __name__ == "__main__":
    main()
