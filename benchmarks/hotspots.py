"""Do hotspots lie on the thing? Places that a model points at, exported, and looked up in the map of what each
pixel shows.

`python -m panorama_vlm.benchmarks.hotspots [MODEL] [--scenes 40]`, MODEL the one at the root of the repository.
The peer are the right places themselves: the middle of a thing with a hole, or behind another one, is not on it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from ..modeling_panorama import PanoramaVLM
from ..pipeline_panorama import PanoramaPipeline
from ..places_panorama import bfov_iou
from ..processing_panorama import PanoramaProcessor
from ..synthetic.questions import Seen
from ..synthetic.write import SAMPLES, World

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = f"{SAMPLES}:lab,park,sunset"  # around no scene that default_model.yaml trains on
SEED = 2026_18
RIGHT = 0.5  # of intersection over union, from which an answer is right, as in the evaluation


def count(pipe: PanoramaPipeline, world: World, number: int) -> Counter[str]:
    """One scene: how many things were asked for, how many answers are right, and how many hotspots of right answers lie
    on their thing in each viewer, and those of the right places."""
    scene = world.scene(number)
    picture, maps = world.labelled_picture(scene)
    assert maps.things is not None
    height, width = maps.things.shape

    def on(thing: int, yaw: float, pitch: float) -> bool:
        row = min(int((0.5 - pitch / 180) * height), height - 1)
        return bool(maps.things[row, int((yaw / 360 + 0.5) * width) % width] == thing)  # type: ignore[index]

    counts: Counter[str] = Counter()
    for thing, words in Seen(scene, np.random.default_rng(number)).named():
        assert thing.place is not None
        index = next(place for place, each in enumerate(scene.things) if each is thing)
        found = pipe.point(picture, words)[:1]
        right = bool(found) and bfov_iou(found[0].place, thing.place) >= RIGHT
        counts += Counter(asked=1, right=right)
        if right:
            (spot,) = pipe.export(picture, found, "pannellum")["hotSpots"]
            (marker,) = pipe.export(picture, found, "photo_sphere_viewer")["markers"]
            angles = (float(marker["position"][name].removesuffix("deg")) for name in ("yaw", "pitch"))
            counts += Counter(pannellum=on(index, spot["yaw"], spot["pitch"]), viewer=on(index, *angles))
            counts["truth"] += on(index, thing.place.yaw, thing.place.pitch)
    return counts


def pipeline_of(folder: Path) -> PanoramaPipeline | None:
    """A model, ready to be asked; `None`, and a sentence, where a folder has none."""
    if not (folder / "config.json").is_file():
        print(f"There is no model in {folder}: name a folder.")
        return None
    logging.disable_progress_bar()
    model = PanoramaVLM.from_checkpoint(folder, dtype=torch.float32).eval()
    processor = PanoramaProcessor.from_pretrained(folder)
    return PanoramaPipeline(model, processor=processor, device="cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.hotspots", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT, help="folder (default: the repository)")
    parser.add_argument("--scenes", type=int, default=40, help="fresh ones (default: 40)")
    options = parser.parse_args(arguments)
    if (pipe := pipeline_of(options.model)) is None:
        return
    world = World(SEED, backgrounds=UNSEEN, kinds=("grounding",))
    counts: Counter[str] = Counter()
    for number in tqdm(range(options.scenes), "scenes"):
        counts += count(pipe, world, number)
    right = max(counts["right"], 1)
    print(f"{counts['asked']} things asked for in {options.scenes} scenes, {counts['right']} answers right")
    print("of these, hotspots that lie on their thing:")
    for name, words in (("pannellum", "Pannellum"), ("viewer", "Photo Sphere Viewer"), ("truth", "the right places")):
        print(f"{words:<22}{counts[name] / right:6.1%}")


if __name__ == "__main__":
    main()
