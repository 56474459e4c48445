"""Where are answers about rendered scenes right, and where not? What an evaluation found, split by surroundings, by
how much a caption names, and by size, height and the seam of what a place is asked of.

`python -m panorama_vlm.benchmarks.default_model [fresh results]`, the folders that `docs/default_model.md` makes:
scenes by `panorama_vlm.synthetic` and the results of `panorama_vlm.evaluation` on them. The peer of each row is the one
beside it: all else alike, another place or surroundings.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..evaluation.answers import places_of
from ..places_panorama import BFoV, bfov_iou, read_places, wrap
from ..synthetic.scenes import COLOURS, SHAPES
from ..synthetic.write import METADATA, SCENES

LISTS = ("count", "grounding_all", "caption_around", "caption_direction")
SMALL, STEEP = 10, 50  # degrees
FEW = 4  # things of a caption
PREDICTIONS = "predictions.jsonl"


def splits(data: Path, results: Path) -> dict[str, list[bool]]:
    """Name of a split -> whether each of its answers is right.

    Raises:
        ValueError: where the answers are not those to the questions of these scenes.
    """
    found: dict[str, list[bool]] = defaultdict(list)
    said = {row["id"]: row for row in _lines(results / PREDICTIONS) if row.get("variant", "0") == "0"}
    for number, (row, scene) in enumerate(zip(_lines(data / METADATA), _lines(data / SCENES), strict=True), 1):
        around = scene["panorama"] or "drawn"
        asked = zip(row["kinds"], row["questions"], row["places"], strict=True)
        for place, (kind, words, places) in enumerate(asked, 1):
            answer = said.pop(f"row-{number}.{place}", None)
            if answer is None:
                continue
            if answer["kind"] != kind:
                raise ValueError(f"{results}: {answer['id']} is a question of kind {answer['kind']}, in {data} {kind}")
            right = bool(answer["right"])
            found[f"{'lists' if kind in LISTS else 'all else'} before {around}"].append(right)
            if kind == "caption_around":
                found[f"caption_around before {around}"].append(right)
                things = row["conversations"][2 * place - 1]["value"].count(";") + 1
                found[f"caption_around, {'up to' if things <= FEW else 'more than'} {FEW} things"].append(right)
            if kind in ("grounding", "what_is_at_place"):
                bfov = BFoV(*places[0]) if places else read_places(words)[0].place
                found["place across the seam" if _on_seam(bfov) else "place elsewhere"].append(right)
            if kind == "grounding":
                theirs = places_of(answer["answer"])
                found["grounding, IoU at least 0.75"].append(len(theirs) == 1 and bfov_iou(theirs[0], bfov) >= 0.75)
                found[f"grounding, {'under' if _size(bfov) < SMALL else 'from'} {SMALL} degrees"].append(right)
                found[f"grounding, {'beyond' if abs(bfov.pitch) > STEEP else 'up to'} {STEEP} degrees"].append(right)
            if kind in ("direction", "grounding"):
                is_solid = any(word in words for word in (*COLOURS, *SHAPES))
                found[f"{kind}, {'solids' if is_solid else 'named things'}"].append(right)
    if said:
        raise ValueError(f"{results}: {len(said)} answers are to no question of {data}, such as {next(iter(said))}")
    return dict(sorted(found.items()))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _on_seam(place: BFoV) -> bool:
    return abs(wrap(place.yaw - 180)) < place.x_fov / 2


def _size(place: BFoV) -> float:
    """The smaller of its extents on the sphere, degrees."""
    return min(place.y_fov, place.x_fov * math.cos(math.radians(place.pitch)))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.default_model", description=__doc__)
    parser.add_argument(
        "data", nargs="?", type=Path, default=Path("fresh"), help="folder of the scenes (default: fresh)"
    )
    parser.add_argument(
        "results", nargs="?", type=Path, default=Path("results"), help="of the answers (default: results)"
    )
    options = parser.parse_args(arguments)
    if not (options.results / PREDICTIONS).is_file() or not (options.data / SCENES).is_file():
        print(f"There are no scenes in {options.data} or no answers in {options.results}: see docs/default_model.md.")
        return
    for name, right in splits(options.data, options.results).items():
        print(f"{name:36} {100 * sum(right) / len(right):5.1f} % of {len(right)}")


if __name__ == "__main__":
    main()
