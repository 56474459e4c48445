"""How fast does the synthetic world come about? Scenes a second, and what rendering straight into views saves.

`python -m panorama_vlm.benchmarks.synthetic [--scenes 60 --processes 2]`: everything between a seed and a picture, on
so many processes of one thread; the last two rows end at the same nine views.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from ..geometry_panorama import ViewOptions
from ..image_processing_panorama import PanoramaImageProcessor
from ..synthetic.cutouts import available
from ..synthetic.questions import ask
from ..synthetic.render import look, render_erp, render_views
from ..synthetic.scenes import Scene, make_scene

_SIZE = 256  # of views


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=60, help="scenes a row and process")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread")
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(_warm_up, range(options.processes)))
        for name in WAYS:
            seconds = list(pool.map(_measure, [name] * options.processes, [options.scenes] * options.processes))
            rate = options.processes * options.scenes / max(seconds)
            print(f"{name:<52} {rate:8.1f} scenes a second on {options.processes} processes", flush=True)


def _warm_up(_: int) -> None:
    for way in WAYS.values():
        way(look(make_scene(0, available())))


def _measure(name: str, scenes: int) -> float:
    made = [look(make_scene(seed, available())) for seed in range(scenes)]
    begin = time.perf_counter()
    for scene in made:
        WAYS[name](scene)
    return time.perf_counter() - begin


def _flat_then_views(scene: Scene) -> Any:
    colour = render_erp(scene, (1024, 2048)).colour.permute(2, 0, 1)
    return _PROCESSOR(colour, do_rescale=False, return_tensors="pt")


_PROCESSOR = PanoramaImageProcessor(image_size=_SIZE)
WAYS: dict[str, Callable[[Scene], Any]] = {
    "a scene from its seed": lambda scene: make_scene(scene.seed, available()),
    "what is seen of each thing": look,
    "its questions": lambda scene: ask(scene, 8),
    "panorama of 512 x 256": lambda scene: render_erp(scene, (256, 512)),
    "panorama of 1024 x 512": lambda scene: render_erp(scene, (512, 1024)),
    "nine views of 256, by a panorama of 2048 x 1024": _flat_then_views,
    "nine views of 256, straight": lambda scene: render_views(scene, ViewOptions().plan, _SIZE),
}


if __name__ == "__main__":
    main()
