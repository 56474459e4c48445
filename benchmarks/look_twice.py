"""Does a second, closer look help with small things, and where it does not, does the aim miss or what is seen there?

`python -m panorama_vlm.benchmarks.look_twice [MODEL] [--questions 60] [--fov 30]`, MODEL the one at the root of the
repository. Questions about the colour and the shape of things of 2 to 6 degrees in synthetic scenes, smaller than any
that training asks about, answered with one look, and with further views of `--fov` degrees where different aims point:
the place that `look_twice=True` and `look_twice="red cube"` propose (with the views that they choose), the brightest
direction of the heat map of the first answer (`panorama_vlm.pictures`), its four brightest, the true place, which no
aim can better, and a direction by chance. Last, how often an aim is within ten degrees of the thing.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..geometry_panorama import Direction, View, ray_angles
from ..pictures import saliency
from ..pipeline_panorama import PanoramaPipeline
from ..places_panorama import BFoV, great_circle
from ..synthetic.questions import SEEN, Seen, _width, fits
from ..synthetic.write import World
from .hotspots import ROOT, UNSEEN, pipeline_of

SEED = 2026_25
SMALL = (2.0, 6.0)  # degrees
_ROWS = 90  # of the heat maps
_APART = 25.0  # degrees between the brightest directions
_NEAR = 10.0


def questions(world: World) -> Iterator[tuple[Image.Image, str, str, str, BFoV]]:
    """Panorama, question, right answer, what it is about in words, and where that is."""
    for number in range(10**6):
        scene = world.scene(number)
        seen, picture = Seen(scene, np.random.default_rng(number)), None
        for thing in seen.there:
            place = thing.place
            if not thing.colour or place is None or thing.seen < SEEN:
                continue
            if not SMALL[0] < min(_width(place), place.y_fov) < SMALL[1]:
                continue
            for attribute, noun, right in (
                ("colour", thing.name, thing.colour),
                ("shape", f"{thing.colour} solid", thing.name),
            ):
                for words in (noun, f"{thing.size} {noun}"):
                    if [other for other in seen.there if fits(other, words)] == [thing]:
                        picture = picture or world.picture(scene)
                        yield picture, f"What {attribute} is the {words}?", right, words, place
                        break


def brightest(heat: np.ndarray, count: int) -> list[tuple[float, float]]:
    """Yaw and pitch of the brightest directions of a heat map [H, 2H], each apart from the others."""
    rays, heat, found = View("erp").rays(heat.shape), heat.copy(), []
    for _ in range(count):
        at = np.unravel_index(heat.argmax(), heat.shape)
        yaw, pitch = ray_angles(rays[at])
        found.append((float(yaw), float(pitch)))
        heat[rays @ rays[at] > np.cos(np.radians(_APART))] = -1
    return found


def with_views(pipe: PanoramaPipeline, picture: Image.Image, words: str, views: Sequence[Direction]) -> dict[str, Any]:
    """The answer with further views."""
    parts = [{"type": "image", "image": picture, "further_views": list(views)}, {"type": "text", "text": words}]
    found: dict[str, Any] = pipe([{"role": "user", "content": parts}])
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.look_twice", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT, help="folder (default: the repository)")
    parser.add_argument("--questions", type=int, default=60, help="(default: 60)")
    parser.add_argument("--fov", type=float, default=30.0, help="degrees of the views of an aim (default: 30)")
    options = parser.parse_args(arguments)
    if (pipe := pipeline_of(options.model)) is None:
        return
    random = np.random.default_rng(0)
    right: dict[str, list[bool]] = defaultdict(list)
    near: dict[str, list[bool]] = defaultdict(list)
    asked = questions(World(SEED, 2048, kinds=("colour", "shape"), backgrounds=UNSEEN))
    for _, (picture, words, answer, what, place) in zip(tqdm(range(options.questions)), asked, strict=False):
        first = pipe(picture, words)
        given = {"panorama": picture, "question": words}
        heat = saliency(pipe, given, first["answer"] or "yes", height=_ROWS).heat
        by_chance = (float(random.uniform(-180, 180)), float(random.uniform(-40, 20)))
        aims = {
            "the heat map's brightest": brightest(heat, 1),
            "its four brightest": brightest(heat, 4),
            "the true place": [(place.yaw, place.pitch)],
            "a direction by chance": [by_chance],
        }
        found = {"one look": first}
        found |= {"look_twice=True": pipe(picture, words, look_twice=True)}
        found |= {'look_twice="red cube"': pipe(picture, words, look_twice=what)}
        for name, directions in aims.items():
            found[name] = with_views(pipe, picture, words, [(*each, options.fov) for each in directions])
        for name, said in found.items():
            right[name].append(said["answer"].strip().lower() == answer)
            looked = [view[:2] for view in said["looked_at"]]
            near[name].append(any(great_circle(each, place[:2]) < _NEAR for each in looked))
    print(f"{options.questions} questions about things of {SMALL[0]:g} to {SMALL[1]:g} degrees")
    print(f"{'aim':<28}{'right':>8}{'within 10 degrees':>20}")
    for name, own in right.items():
        print(f"{name:<28}{statistics.mean(own):8.0%}{statistics.mean(near[name]):20.0%}")


if __name__ == "__main__":
    main()
