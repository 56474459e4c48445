"""Index panoramas, and ask which of them shows something, and which way to look.

`python -m panorama_vlm.search index FOLDER --model MODEL --output INDEX` (or by `accelerate launch -m` on several
processes), then `query INDEX --example view.jpg --fov 60`, or `query INDEX --like panorama.jpg --yaw 30`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor
from .index import Hit, PanoramaIndex, mark_of
from .matching import KINDS, TokenEncoder

MODEL = "model"  # in an index: where the model is that made it
_LONG = timedelta(days=7)  # a process waits for the others


def parser() -> argparse.ArgumentParser:
    """The options, each with its help."""
    own = argparse.ArgumentParser(
        prog="python -m panorama_vlm.search", description="Which panorama shows it, and which way to look."
    )
    commands = own.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="index a folder; a run that was stopped goes on")
    index.add_argument("source", help="folder of panoramas")
    index.add_argument("--model", required=True, help="folder or Hub id of a trained model")
    index.add_argument("--output", required=True, help="folder of the index")
    index.add_argument("--tokens", choices=KINDS, default=KINDS[0], help="what is indexed (default: %(default)s)")
    index.add_argument("--batch-size", type=int, default=8, help="panoramas at once (default: %(default)s)")
    index.add_argument("--workers", type=int, default=0, help="processes that read files (default: %(default)s)")
    query = commands.add_parser("query", help="ask")
    query.add_argument("index", help="folder of the index")
    query.add_argument("words", nargs="?", help="what is looked for in words")
    query.add_argument("--example", metavar="FILE", help="a photograph of what is looked for")
    query.add_argument("--like", metavar="FILE", help="a panorama that shows it, at --yaw and --pitch")
    query.add_argument("--yaw", type=float, default=0.0, help="degrees to the right of its front (default: 0)")
    query.add_argument("--pitch", type=float, default=0.0, help="degrees upwards (default: 0)")
    query.add_argument("--fov", type=float, default=60.0, help="degrees of the shorter side (default: %(default)s)")
    query.add_argument("--count", type=int, default=10, help="hits (default: %(default)s)")
    query.add_argument("--model", help="folder or Hub id (default: the one that made the index)")
    query.add_argument("--json", action="store_true", help="print JSON")
    for each in (index, query):
        each.add_argument("--device", help="where the model runs (default: a GPU where there is one)")
    return own


def main(arguments: list[str] | None = None) -> None:
    """The command line. It ends with 1 where panoramas were skipped, with 2 where nothing could be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    try:
        bad = _index(options, arguments) if options.command == "index" else _query(options)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {(str(error).strip() or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if bad else 0)


def load(name: str, kind: str, device: Any) -> TokenEncoder:
    """The encoder of a model in a folder or on the Hub."""
    read = PanoramaVLM.from_checkpoint if Path(name).is_dir() else PanoramaVLM.from_pretrained
    model = read(name, dtype=torch.float32).to(device)
    return TokenEncoder(model, PanoramaProcessor.from_pretrained(name), kind)


def _index(options: argparse.Namespace, arguments: list[str]) -> bool:
    from ..train.launching import start_processes

    if options.batch_size < 1 or options.workers < 0:
        raise ValueError(
            f"--batch-size must be at least 1 and --workers at least 0, got {options.batch_size} and {options.workers}"
        )
    start_processes("panorama_vlm.search", arguments)
    from accelerate import Accelerator, InitProcessGroupKwargs

    from .build import index_folder

    accelerator = Accelerator(cpu=options.device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONG)])
    encoder = load(options.model, options.tokens, options.device or accelerator.device)
    own = {"batch_size": options.batch_size, "workers": options.workers}
    done = index_folder(options.source, encoder, options.output, accelerator, **own)
    if accelerator.is_main_process:
        name = os.path.abspath(options.model) if Path(options.model).is_dir() else options.model
        Path(options.output, MODEL).write_text(name + "\n", encoding="utf-8")
        for file, reason in done.skipped.items():
            print(f"skipped {file}: {reason}", file=sys.stderr)
        if done.left_out:
            print(f"left out {done.left_out}", file=sys.stderr)
        skipped = f", {len(done.skipped)} skipped" if done.skipped else ""
        print(f"{options.output}: {done.held} panoramas, {done.added} of them new{skipped}")
    accelerator.end_training()
    return bool(done.skipped)


def _query(options: argparse.Namespace) -> bool:
    given = [name for name in ("words", "example", "like") if getattr(options, name) is not None]
    if len(given) != 1:
        raise ValueError("name one thing to look for: --example FILE, or --like PANORAMA with --yaw and --pitch")
    if given == ["words"]:
        raise ValueError(
            "the tokens of an index are of pictures only, words are not in the same space: name a picture of it by "
            "--example, or a place in a panorama by --like"
        )
    mark = mark_of(options.index)
    where = Path(options.index, MODEL)
    name = options.model or (where.read_text(encoding="utf-8").strip() if where.is_file() else None)
    if name is None:
        raise ValueError(f"{options.index!r} does not say where its model is: name it by --model")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    index = PanoramaIndex(options.index, load(name, mark["tokens"], device))
    if options.example is not None:
        hits = index.query(options.example, options.fov, options.count)
    else:
        hits = index.query_like(options.like, options.yaw, options.pitch, options.fov, options.count)
    show(hits, options.json)
    return False


def show(hits: list[Hit], as_json: bool) -> None:
    """Print hits, one a line."""
    if as_json:
        print(json.dumps([hit._asdict() for hit in hits], ensure_ascii=False, indent=1))
        return
    for hit in hits:
        side = f"{abs(hit.yaw):.0f} degrees to the {'right' if hit.yaw >= 0 else 'left'}"
        print(f"{hit.score:.3f}  {hit.panorama}: look {side}, {hit.pitch:.0f} up")
    if not hits:
        print("nothing found")


if __name__ == "__main__":
    main()
