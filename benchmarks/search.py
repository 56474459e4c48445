"""Does an example view find its panorama, and the way to look?

`python -m panorama_vlm.benchmarks.search [MODEL] [--scenes 500] [--queries 100]`, MODEL the one at the root of the
repository. Fresh scenes, half of them around real panoramas, are indexed. An example is what one of them shows in a
random direction (within 37 degrees of the horizon) and field of view (45 to 90 degrees), brighter or darker by up to
15 %, as a JPEG of 320 pixels and quality 75. Things fill at least 2 % of it: the same wall or sky is in many scenes.
The peer are mean-pooled views: a vector for each tile (`direction_embeds`), one for the example (`get_view_features`).
"""

from __future__ import annotations

import argparse
import io
import math
import shutil
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from ..geometry_panorama import Direction, View, ViewPlan, ray_angles
from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor
from ..sampling_panorama import erp_to_views
from ..search import PanoramaIndex
from ..search.build import index_folder
from ..search.index import name_of
from ..search.matching import KINDS, TokenEncoder
from ..synthetic.write import World
from .hotspots import ROOT, UNSEEN

SEED = 2026_18_3
FOVS, HIGHEST, LEAST = (45.0, 90.0), 0.6, 0.02
SIZE, QUALITY, LIGHT = 320, 75, 0.15


class Example(NamedTuple):
    """A view of a scene: its JPEG, the file of the scene, and where it looks."""

    data: bytes
    file: str
    direction: Direction
    around: str


def scenes(folder: Path, count: int) -> list[Example]:
    """Scenes as files of a folder, and an example of each."""
    world, random = World(SEED, backgrounds=UNSEEN), np.random.default_rng(SEED)
    found = []
    for number in tqdm(range(count), "scenes"):
        scene = world.scene(number)
        picture, maps = world.labelled_picture(scene)
        assert maps.things is not None
        file = folder / f"{number:05}.jpg"
        picture.save(file, quality=92, subsampling=0)
        direction = draw(maps.things, random)
        erp = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
        view = erp_to_views(erp, ViewPlan((View("perspective", *direction),)), SIZE)[0].permute(1, 2, 0)
        pixels = (view * random.uniform(1 - LIGHT, 1 + LIGHT)).clamp(0, 255).byte().numpy()
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=QUALITY)
        found.append(Example(data.getvalue(), name_of(file), direction, "real" if scene.panorama else "drawn"))
    return found


def draw(things: np.ndarray, random: np.random.Generator) -> Direction:
    """A direction in which things [H, W] (negative: none) fill enough of the view."""
    while True:
        pitch = math.degrees(math.asin(random.uniform(-HIGHEST, HIGHEST)))
        direction = (random.uniform(-180, 180), pitch, random.uniform(*FOVS))
        yaws, pitches = ray_angles(View("perspective", *direction).rays((64, 64)))
        height, width = things.shape
        rows = ((0.5 - pitches / 180) * height).astype(int).clip(0, height - 1)
        if (things[rows, ((yaws / 360 + 0.5) * width).astype(int) % width] >= 0).mean() >= LEAST:
            return direction


def angle(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Degrees between two directions of yaw and pitch."""
    rays = [View("perspective", *each, 60.0).rotation[:, 2] for each in (one, other)]
    return math.degrees(math.acos(min(1.0, float(rays[0] @ rays[1]))))


@torch.no_grad()
def pooled(model: Any, images: Any, files: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of the tiles of panoramas [N, tiles, D], and which way they look [tiles, 3]."""
    found = [model.get_panorama_features(**images(file, return_tensors="pt")) for file in tqdm(files, "peer")]
    return torch.cat([each.direction_embeds for each in found]), found[0].directions


def line(name: str, right: list[bool], aside: list[float]) -> str:
    """A row of the table."""
    middle = f"{np.median(aside):6.1f}" if aside else "     -"
    return f"{name:<36}{np.mean(right) if right else math.nan:8.1%}{middle:>12}{len(right):8}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.search", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT, help="folder (default: the repository)")
    parser.add_argument("--scenes", type=int, default=500, help="fresh ones (default: 500)")
    parser.add_argument(
        "--queries", type=int, default=100, help="of them are asked about, evenly spread, at most all (default: 100)"
    )
    parser.add_argument("--tokens", choices=KINDS, default=KINDS[0], help="what is indexed (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        print(f"There is no model in {options.model}: name a folder.")
        return
    if find_spec("lancedb") is None:
        print("It needs LanceDB: pip install 'panorama-vlm[search]'")
        return
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="no equirectangular panorama")
    model = PanoramaVLM.from_checkpoint(options.model, dtype=torch.float32).eval()
    processor = PanoramaProcessor.from_pretrained(options.model)
    folder = Path(tempfile.mkdtemp(prefix="search-"))
    try:
        run(model, processor, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(model: Any, processor: Any, folder: Path, options: argparse.Namespace) -> None:
    """Render, index, ask, print."""
    (folder / "scenes").mkdir()
    examples = scenes(folder / "scenes", options.scenes)
    encoder = TokenEncoder(model, processor, options.tokens)
    index_folder(folder / "scenes", encoder, folder / "index", Accelerator(cpu=True))
    index = PanoramaIndex(folder / "index", encoder)
    size = sum(each.stat().st_size for each in (folder / "index").rglob("*") if each.is_file())
    print(f"{len(index)} tokens of {options.scenes} panoramas, {size / len(index):.0f} bytes a token")
    vectors, directions = pooled(model, processor.image_processor, [each.file for each in examples])
    right: dict[tuple[str, str], list[bool]] = {}
    aside: dict[str, list[float]] = {"ours": [], "peer": []}
    asked = np.linspace(0, options.scenes - 1, min(options.queries, options.scenes)).round().astype(int)
    for number in (progress := tqdm(asked.tolist(), "queries")):
        example = examples[number]
        hits = index.query(example.data, example.direction[2], 1)
        with torch.no_grad():
            photograph = processor.image_processor.photographs(example.data)
            own = model.get_view_features(photograph, fov_deg=example.direction[2])[0]
        file, tile = divmod(int((vectors @ own).argmax()), len(directions))
        found = {
            "ours": [(each.panorama, each.yaw, each.pitch) for each in hits],
            "peer": [(examples[file].file, *directions[tile, :2].tolist())],
        }
        for who, places in found.items():
            is_right = bool(places) and places[0][0] == example.file
            right.setdefault((who, example.around), []).append(is_right)
            if is_right:
                aside[who].append(angle(places[0][1:], example.direction[:2]))
        progress.set_postfix({who: len(degrees) for who, degrees in aside.items()})
    print(f"{'':<36}{'recall@1':>8}{'degrees off':>12}{'asked':>8}")
    for who, words in (("ours", f"index of {options.tokens} tokens"), ("peer", "mean-pooled views")):
        of_all = [each for (name, _), own in right.items() for each in own if name == who]
        print(line(words, of_all, aside[who]))
        for around in ("drawn", "real"):
            print(line(f"  around: {around}", right.get((who, around), []), []))


if __name__ == "__main__":
    main()
