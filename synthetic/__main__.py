"""Command line of the synthetic world: `python -m panorama_vlm.synthetic OUT --scenes N --seed S`."""

from __future__ import annotations

import argparse
import logging
import sys

from .questions import KINDS
from .tables import TABLES
from .write import SAMPLES, World, write_scenes


def main(arguments: list[str] | None = None) -> None:
    """Write a folder of scenes; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.synthetic",
        description="Rendered panoramas of which everything is known, with questions and exact answers.",
    )
    parser.add_argument("out", help="folder to write into; one that was not finished is gone on with")
    parser.add_argument("--scenes", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    parser.add_argument("--size", default="1024x512", help="of the panoramas in pixels (default: 1024x512)")
    parser.add_argument("--questions", type=int, default=8, help="a scene, at most (default: 8)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=[],
        metavar="KIND",
        help=f"of questions, count:2 twice as often as others: {', '.join(KINDS)}; all are those not named",
    )
    parser.add_argument(
        "--tables", type=int, default=0, help="a scene, at most: many things a conversation (default: 0)"
    )
    parser.add_argument("--table-kinds", nargs="+", default=[], metavar="KIND", help=f"of tables: {', '.join(TABLES)}")
    parser.add_argument("--steps", action="store_true", help="answers carry their steps: <think>STEPS</think>ANSWER")
    parser.add_argument("--backgrounds", default=str(SAMPLES), help="folder of real panoramas (default: the samples)")
    parser.add_argument("--no-backgrounds", action="store_true", help="drawn surroundings only")
    parser.add_argument("--vary-backgrounds", action="store_true", help="other colours, light and mixtures a scene")
    parser.add_argument("--unknown", action="store_true", help="things that training never has")
    parser.add_argument("--contact-sheet", action="store_true", help="also write contact_sheet.jpg")
    parser.add_argument("--processes", type=int, help="that render (default: one a core)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        world = World(
            seed=options.seed,
            width=_width(options.size),
            questions=options.questions,
            kinds=tuple(options.kinds),
            backgrounds=None if options.no_backgrounds else options.backgrounds,
            unknown=options.unknown,
            tables=options.tables,
            table_kinds=tuple(options.table_kinds),
            steps=options.steps,
            vary_backgrounds=options.vary_backgrounds,
        )
        write_scenes(options.out, world, options.scenes, options.processes, options.contact_sheet)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _width(size: str) -> int:
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) == 2 * int(height)):
        raise ValueError(f"--size must be WIDTHxHEIGHT, twice as wide as high, such as 1024x512, got {size!r}")
    return int(width)


if __name__ == "__main__":
    main()
