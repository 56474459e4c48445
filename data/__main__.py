"""Command line of the data: `python -m panorama_vlm.data check SOURCE`."""

from __future__ import annotations

import argparse
import logging
import sys

import datasets

from ..stages_panorama import STAGES
from .check import check_source
from .files import package_path
from .sources import DataSource

_OPTIONS = {  # of a source -> what it is
    "images": "folder that relative image paths start from",
    "split": "of a saved or a Hub dataset",
    "subset": "of a Hub dataset",
    "projection": "of its images, where they are not equirectangular, as of the trainer's source",
    **{
        f"{what}_column": "found by its usual names"
        for what in ("image", "question", "answer", "conversation", "tables")
    },
}
_FLAGS = {
    "streaming": "read it as a stream",
    "allow_outside": "rows may name images outside the source's own folder",
    "fetch": "images on the web are fetched in training (not here)",
}


def main(arguments: list[str] | None = None) -> None:
    """Print what the check of a source finds; status 1 where training would fail, 2 where the trainer refuses it."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.data", description="Data for the trainer.")
    check = parser.add_subparsers(dest="command", required=True).add_parser(
        "check", help="open a source as the trainer does, say what it is and what of it cannot be used"
    )
    check.add_argument("source", help="as `data` of the trainer: a folder, a file, a Hub dataset, synthetic://?...")
    check.add_argument(
        "--stage", choices=STAGES, help="of training (default: the last that the source has columns for)"
    )
    check.add_argument("--rows", type=int, help="look at so many, spread evenly (default: all; of a stream, 1000)")
    check.add_argument("--max-bad-share", type=float, default=0.1, help="as the trainer's (default: %(default)s)")
    for name, words in _OPTIONS.items():
        check.add_argument(f"--{name.replace('_', '-')}", help=words)
    for name, words in _FLAGS.items():
        check.add_argument(f"--{name.replace('_', '-')}", help=words, action="store_true")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    datasets.disable_progress_bars()
    given = {name: options[name] for name in (*_OPTIONS, *_FLAGS) if options[name] is not None}
    try:
        source = DataSource(package_path(options["source"]), **given)
        report = check_source(source, options["stage"], rows=options["rows"], max_bad_share=options["max_bad_share"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(report)
    if report.failure is not None:
        print(f"training would fail: {report.failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
