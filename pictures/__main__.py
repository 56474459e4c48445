"""The pictures as commands:

    python -m panorama_vlm.pictures views PANORAMA [--model MODEL]         the views on the panorama
    python -m panorama_vlm.pictures matches PANORAMA [--model MODEL]       which tokens stage `vision` compares
    python -m panorama_vlm.pictures features PANORAMA MODEL [MODEL ...]    PCA of token features on the sphere
    python -m panorama_vlm.pictures saliency MODEL PANORAMA "QUESTION"     where an answer looked
    python -m panorama_vlm.pictures curves RUN [RUN ...]                   the learning curves of runs
    python -m panorama_vlm.pictures directions RESULTS [RESULTS ...]       the evaluation by direction

The ending of `--output` says the format (PNG, JPEG, SVG, PDF). Colours are those that colour-blind readers can tell
apart, with numbers, line styles or hatches beside them, and their lightness alone says as much.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers.utils import logging

from ..configuration_panorama import PanoramaConfig
from ..exports_panorama import whole_sphere
from ..geometry_panorama import VIEW_STRATEGIES, Grid, ViewOptions, ViewPlan
from ..image_processing_panorama import READ_OPTIONS, PanoramaImageProcessor
from ..modeling_panorama import PanoramaVLM
from ..pipeline_panorama import PanoramaPipeline
from ..processing_panorama import PanoramaProcessor
from .features import TOKENS, draw_features, token_features
from .figure import WIDTH, told_apart
from .heat import draw_saliency, saliency
from .runs import draw_curves, draw_directions
from .views import draw_matches, draw_views


def _load(name: str, device: str = "cpu") -> PanoramaPipeline:
    """A model and its processor, from a folder or the Hub."""
    try:
        load = PanoramaVLM.from_checkpoint if Path(name).is_dir() else PanoramaVLM.from_pretrained
        model = load(name).eval().to(device)
        return PanoramaPipeline(model, processor=PanoramaProcessor.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name!r}: {str(error).strip().splitlines()[0]}") from error


def _opened(panorama: str, processor: PanoramaImageProcessor | None = None) -> Image.Image:
    """A panorama as a model's processor lays it on the sphere."""
    own = {name: getattr(processor, name) for name in READ_OPTIONS} if processor else {}
    return whole_sphere(panorama, 2 * WIDTH, **own)


def _views_of(options: argparse.Namespace) -> tuple[Image.Image, ViewPlan, float, Grid]:
    """The panorama, the views, their overlap and tokens, of a model's folder or of options."""
    if options.model:
        try:
            processor = PanoramaProcessor.from_pretrained(options.model)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load the processor of {options.model!r}: {first}") from error
        config = PanoramaConfig.from_pretrained(options.model)
        picture = _opened(options.panorama, processor.image_processor)
        return picture, config.view_plan, config.overlap_ratio, config.token_grid
    own = ViewOptions(options.view_strategy, options.fov_deg, options.overlap_ratio, pole_caps=options.pole_caps)
    return _opened(options.panorama), own.plan, own.overlap_ratio, (16, 16)


def _views(options: argparse.Namespace) -> Figure:
    picture, plan, _, _ = _views_of(options)
    return draw_views(picture, plan)


def _matches(options: argparse.Namespace) -> Figure:
    picture, plan, overlap, grid = _views_of(options)
    return draw_matches(picture, plan, overlap, grid)


def _features(options: argparse.Namespace) -> Figure:
    features = []
    for name, words in zip(told_apart(options.models), options.models, strict=True):
        pipe = _load(words, options.device)
        source = pipe.processor.image_processor
        picture = _opened(options.panorama, source)
        features += [
            token_features(pipe.model, pipe.processor, options.panorama, kind, f"{name}, {kind}")
            for kind in options.tokens
        ]
    return draw_features(picture, features)


def _saliency(options: argparse.Namespace) -> Figure:
    pipe = _load(options.model, options.device)
    found = saliency(pipe, {"panorama": options.panorama, "question": options.question}, options.answer)
    print(found.answer)
    return draw_saliency(_opened(options.panorama, pipe.processor.image_processor), found, options.question)


def make_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="PICTURE")

    def command(name: str, words: str, draw: Callable[[argparse.Namespace], Figure]) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=words, description=words)
        own.add_argument("--output", default=f"{name}.png", help=f"picture that is written (default: {name}.png)")
        own.set_defaults(draw=draw)
        return own

    default = "cuda" if torch.cuda.is_available() else "cpu"
    for name, words, draw in (
        ("views", "the views on the panorama", _views),
        ("matches", "which tokens of the first two tiles stage vision compares", _matches),
    ):
        own = command(name, words, draw)
        own.add_argument("panorama", help="file of a panorama")
        own.add_argument("--model", help="folder or Hub id whose views these are; without it the options say")
        own.add_argument("--view-strategy", default="anyres_e2p", choices=sorted(VIEW_STRATEGIES))
        own.add_argument("--pole-caps", action="store_true", help="one tile straight up and one straight down")
        own.add_argument("--fov-deg", type=float, default=90.0, help="field of view (default: 90)")
        own.add_argument("--overlap-ratio", type=float, default=0.5, help="of neighbouring tiles (default: 0.5)")
    own = command("features", "principal components of token features on the sphere", _features)
    own.add_argument("panorama", help="file of a panorama")
    own.add_argument("models", nargs="+", metavar="MODEL", help="folders or Hub ids, such as before and after a stage")
    own.add_argument("--tokens", nargs="+", choices=TOKENS, default=["resampler"], help="(default: resampler)")
    own.add_argument("--device", default=default, help="where the models run")
    own = command("saliency", "where an answer looked", _saliency)
    own.add_argument("model", help="folder or Hub id")
    own.add_argument("panorama", help="file of a panorama")
    own.add_argument("question", help="in words")
    own.add_argument("--answer", help="what was said (default: what the model says)")
    own.add_argument("--device", default=default, help="where the model runs")
    own = command("curves", "the learning curves of runs", lambda options: draw_curves(options.runs))
    own.add_argument("runs", nargs="+", metavar="RUN", help="folders that the trainer wrote (--output)")
    own = command("directions", "accuracy by direction", lambda options: draw_directions(options.results))
    own.add_argument("results", nargs="+", metavar="RESULTS", help="folders that the evaluation wrote (--output)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = make_parser().parse_args(arguments)
    logging.disable_progress_bar()
    try:
        figure = options.draw(options)
        figure.savefig(options.output)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
