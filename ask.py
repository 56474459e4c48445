"""Ask a model about a panorama: `python -m panorama_vlm.ask MODEL PANORAMA "question"`.

Instead of a question `--point "red cube"`, `--detect cube` or `--describe`; `--save FILE` writes the places found.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .exports_panorama import file_stem
from .modeling_panorama import PanoramaVLM
from .pipeline_panorama import PanoramaPipeline
from .places_panorama import NamedPlace, write_places
from .processing_panorama import PanoramaProcessor, split_steps

ENDINGS = {
    ".pannellum.json": "pannellum",
    ".psv.json": "photo_sphere_viewer",
    ".geojson": "geojson",
    ".coco.json": "coco",
    ".jpg": "drawing",
    ".png": "drawing",
    "/": "crops",
}  # of what `--save` writes


def answer(
    model: PanoramaVLM,
    processor: PanoramaProcessor,
    messages: list[dict[str, Any]],
    max_new_tokens: int = 64,
    **options: Any,
) -> str:
    """What the model says next in a conversation, decoded greedily; the answer without the steps before it.

    Args:
        model, processor: that belong together.
        messages: as for `processor.apply_chat_template`; the last one is the user's.
        max_new_tokens: of the answer, at most.
        options: for `generate`.

    Raises:
        ValueError: for a panorama that cannot be read, or messages that the chat template refuses.
    """
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    ).to(model.device)
    options = {"do_sample": False, "return_dict_in_generate": True, "tokenizer": processor.tokenizer, **options}
    output: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    return split_steps(output.text[0]).answer


def question(panorama: Any, words: str) -> list[dict[str, Any]]:
    """The messages of one question about one panorama."""
    parts = [{"type": "image", "image": panorama}, {"type": "text", "text": words}]
    return [{"role": "user", "content": parts}]


def save(pipe: PanoramaPipeline, panorama: str, places: Sequence[NamedPlace], file: str, **options: Any) -> None:
    """Write places into a file, in the form that its ending names (:data:`ENDINGS`), or each cut out into a folder.

    Args:
        pipe: that found them.
        panorama: they are places of.
        file: new, or written anew.
        options: `position`, `heading` and `reach` of :func:`to_geojson`.

    Raises:
        ValueError: for another ending, and where the panorama does not allow the form.
    """
    to = export_of(file)
    made = pipe.export(panorama, places, to, **(options if to == "geojson" else {}))
    if to == "drawing":
        made.save(file)
    elif to == "crops":
        Path(file).mkdir(parents=True, exist_ok=True)
        for number, (crop, each) in enumerate(zip(made, places, strict=True), 1):
            crop.save(Path(file, f"{number:02}-{file_stem(each.label)}.jpg"))
    else:  # so that it may stand in a script of a web page, too
        Path(file).write_text(json.dumps(made, indent=1).replace("<", "\\u003c") + "\n", encoding="utf-8")


def export_of(file: str) -> str:
    """What the ending of a file's name stands for.

    Raises:
        ValueError: where it stands for nothing.
    """
    found = [to for ending, to in ENDINGS.items() if file.lower().endswith(ending)]
    if not found:
        raise ValueError(f"--save takes names that end in {', '.join(ENDINGS)} (crops, into a folder), got {file!r}")
    return found[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.ask", description="Ask a model about a panorama; the answer is printed."
    )
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("panorama", help="file of an equirectangular image")
    parser.add_argument("question", nargs="*", help="words of the question")
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--point", nargs="+", metavar="THING", help='where it is, such as "red cube"')
    verbs.add_argument("--detect", nargs="+", metavar="KIND", help='where all of them are, such as "cube"')
    verbs.add_argument("--describe", nargs="?", type=int, const=8, metavar="N", help="what is in N directions (8)")
    parser.add_argument(
        "--look-twice", nargs="?", const=True, default=False, metavar="THING", help="look closer (there), then answer"
    )
    parser.add_argument("--headings", type=int, default=1, metavar="N", help="ask at N headings, most answers win (1)")
    parser.add_argument(
        "--turn-words",
        action=argparse.BooleanOptionalAction,
        help="with --headings: whether words of direction in answers are seen from the front, and turn",
    )
    parser.add_argument("--save", nargs="+", default=[], metavar="FILE", help=f"places found, into {' '.join(ENDINGS)}")
    parser.add_argument("--position", nargs=2, type=float, metavar=("LAT", "LON"), help="of the camera, for .geojson")
    parser.add_argument("--heading", type=float, metavar="DEG", help="compass direction of the front, for .geojson")
    parser.add_argument("--reach", type=float, metavar="M", help="metres that lines of .geojson go (default: points)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="length of an answer, at most (default: 64; of --point and --detect 256)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    verb = options.point or options.detect or options.describe
    if bool(options.question) == (verb is not None):
        parser.error("ask a question, or one of --point, --detect and --describe")
    if options.describe is not None and (options.save or options.look_twice or options.headings != 1):
        parser.error("--describe finds no places: --save, --look-twice and --headings belong to the others")
    if options.headings == 1 and options.turn_words is not None:
        parser.error("--turn-words says what becomes of answers at several headings: give --headings, too")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    try:
        for file in options.save:
            export_of(file)
        load = PanoramaVLM.from_checkpoint if Path(options.model).is_dir() else PanoramaVLM.from_pretrained
        model = load(options.model)
        processor = PanoramaProcessor.from_pretrained(options.model)
        pipe = PanoramaPipeline(model.eval(), processor=processor, device=options.device)
        lines, places = _answered(pipe, options)
        own = {"position": options.position and tuple(options.position)}
        own |= {"heading": options.heading, "reach": options.reach}
        for file in options.save:
            save(pipe, options.panorama, places, file, **own)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))


def _answered(pipe: PanoramaPipeline, options: argparse.Namespace) -> tuple[list[str], list[NamedPlace]]:
    """What is printed, and the places in it."""
    length = options.max_new_tokens
    own: dict[str, Any] = {
        "max_new_tokens": (256 if options.point or options.detect else 64) if length is None else length
    }
    if options.describe is not None:
        return [str(each) for each in pipe.describe(options.panorama, options.describe, **own)], []
    own |= {"look_twice": options.look_twice, "headings": options.headings, "turn_words": options.turn_words}
    if options.question:
        said = pipe(options.panorama, " ".join(options.question), **own)
        agreed = (
            f" ({round(said['agreement'] * options.headings)} of {options.headings})" if options.headings > 1 else ""
        )
        return [said["answer"] + agreed], said["places"]
    find = pipe.point if options.point else pipe.detect
    places = find(options.panorama, options.point or options.detect, **own)
    return [f"{each.label}: {write_places([each])}" for each in places] or ["[]"], places


if __name__ == "__main__":
    main()
