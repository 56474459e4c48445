"""Command line of the evaluation: `accelerate launch -m panorama_vlm.evaluation MODEL DATA [--option value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

from transformers.utils import logging as transformers_logging

from ..train.launching import start_processes
from .evaluate import EvaluationOptions, evaluate
from .report import percent, rows_of
from .scores import METRICS

_LONG = timedelta(days=7)  # a process waits for the others, whose questions may take longer


def parser() -> argparse.ArgumentParser:
    """The options, each with its help."""
    options = argparse.ArgumentParser(
        prog="accelerate launch -m panorama_vlm.evaluation",
        description="Ask a model the questions of a data set, on any number of processes, and say what its answers are "
        "worth. A run that was stopped goes on when the same command is started again.",
    )
    default: Any = EvaluationOptions("", "")
    options.add_argument("model", help="folder or Hub id of a PanoramaVLM")
    options.add_argument("data", help="file, folder or Hub id of the questions")
    options.add_argument("--split", default=default.split, help="of a data set that has several (default: %(default)s)")
    options.add_argument("--images", help="folder of the panoramas, where the data name them from elsewhere")
    options.add_argument("--format", help="of the data; recognised where it is not given")
    options.add_argument(
        "--metrics", nargs="+", default=list(METRICS), metavar="METRIC", help=f"of {', '.join(METRICS)} (default: all)"
    )
    options.add_argument("--limit", type=int, help="ask the first questions only")
    for name, words in (
        ("batch_size", "questions that a process asks at once"),
        ("max_new_tokens", "length of an answer, at most"),
    ):
        flag = f"--{name.replace('_', '-')}"
        options.add_argument(flag, type=int, default=getattr(default, name), help=f"{words} (default: %(default)s)")
    options.add_argument("--output", default=default.output, help="folder of the results (default: %(default)s)")
    options.add_argument("--blind", action="store_true", help="baseline: the same model before a black panorama")
    options.add_argument(
        "--always-most-common", action="store_true", help="baseline: the most common right answer of each kind"
    )
    options.add_argument("--peer", metavar="FOLDER", help="baseline: another image-text-to-text model, flat panoramas")
    options.add_argument("--turn", type=int, default=1, metavar="N", help="ask at N headings, answers turned along")
    options.add_argument(
        "--tilt",
        type=float,
        default=0.0,
        metavar="D",
        help="ask again with the camera D degrees off level, answers kept",
    )
    options.add_argument("--compare", metavar="DIR", help="results of another model on the same questions")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Evaluate; see the top of this file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = vars(parser().parse_args(arguments))
    start_processes("panorama_vlm.evaluation", arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    for noisy in ("httpx", "datasets", "PIL", "accelerate", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from accelerate import Accelerator, InitProcessGroupKwargs

    try:
        options = EvaluationOptions(**given)
        options.check()
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONG)])
        metrics = evaluate(options, accelerator)
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("Where it happened", exc_info=True)
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {(str(error).strip() or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    if accelerator.is_main_process:
        print(table(metrics))
        print(f"Written to {options.output}", file=sys.stderr)
    accelerator.end_training()


def table(metrics: dict[str, Any]) -> str:
    """What came out, as lines of text."""
    rows = [("", "value", "95 %", "chance", "count"), *rows_of(metrics)]
    if "compare" in metrics:
        each = metrics["compare"]["headline"]
        edges = " – ".join(f"{100 * edge:+.1f}" for edge in each["interval"] or [])
        rows.append(("better than --compare by", f"{100 * each['difference']:+.1f} %", edges, "", ""))
        rows.append(("share of draws above zero", percent(each["above_zero"]), "", "", ""))
    if metrics["errors"]:
        rows.append(("panoramas that cannot be read", "", "", "", str(len(metrics["errors"]))))
    if metrics["dropped"]:
        rows.append(("rows that are no question", "", "", "", str(metrics["dropped"])))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


if __name__ == "__main__":
    main()
