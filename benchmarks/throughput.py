"""How long does a training step wait for data? The trainer itself, with 0, 1 and 2 workers, from files and from
prepared views.

Stage `vision` on JPEG files of 4,096 x 2,048 pixels: per panorama, the least computing of the three stages, so the
hardest to keep fed. `waiting` is the share of a step spent waiting for the next batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 256,
    "patch_size": 16,
    "vision_use_head": False,
}


def make_files(folder: Path, count: int, width: int) -> None:
    """Panoramas with real detail at their size: the samples side by side, each in another order."""
    samples = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    for number in range(count):
        mosaic = Image.new("RGB", (width, width // 2))
        for place in range((width // 512) ** 2):
            row, column = divmod(place, width // 512)
            mosaic.paste(samples[(5 * place + number) % len(samples)], (512 * column, 256 * row))
        mosaic.save(folder / f"{number:03d}.jpg", quality=92)


def run(files: Path, output: Path, workers: int, cache: Path | None, options: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps after the first ones, which fill the pipeline."""
    tower = json.dumps({**TOWER, "num_hidden_layers": options.layers})
    command = [sys.executable, "-m", "panorama_vlm.train", "tiny.yaml", "--stage", "vision", "--output", str(output)]
    command += ["--compose.vision", tower, "--data", str(files), "--vision.batch_size", str(options.batch)]
    command += ["--vision.max_steps", str(options.steps), "--num_workers", str(workers), "--save_every", "100000"]
    command += [] if cache is None else ["--cache_dir", str(cache)]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (output / "logs/vision/metrics.jsonl").read_text().splitlines()]
    steady = lines[options.steps // 3 :]
    names = ("panoramas_per_second", "seconds_per_step", "waiting")
    return {name: statistics.median(line[name] for line in steady) for name in names}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.throughput", description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run; the first third is not counted")
    parser.add_argument("--batch", type=int, default=2, help="panoramas a step")
    parser.add_argument(
        "--layers", type=int, default=6, help="of the vision tower, 384 wide, on nine views of 256 pixels"
    )
    parser.add_argument("--width", type=int, default=4096, help="of the files in pixels")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "files")
        files.mkdir()
        make_files(files, 6, options.width)
        cache = Path(folder, "views")
        filled = argparse.Namespace(**{**vars(options), "steps": 24, "layers": 1})  # every heading of every file
        runs = [(kind, workers) for kind in ("files", "prepared views") for workers in (0, 1, 2)]
        for number, (kind, workers) in enumerate(tqdm(runs, desc="runs")):
            if kind != "files" and not cache.exists():
                run(files, Path(folder, "fill"), 2, cache, filled)
            used = None if kind == "files" else cache
            rows.append((kind, workers, run(files, Path(folder, str(number)), workers, used, options)))
    size = f"{options.width} x {options.width // 2}"
    print(f"Stage vision, {options.batch} panoramas of {size} a step, tower of {options.layers} layers")
    print("\n| from | workers | panoramas a second | seconds a step | waiting for data |\n|---|--:|--:|--:|--:|")
    for kind, workers, figures in rows:
        speed, seconds = figures["panoramas_per_second"], figures["seconds_per_step"]
        print(f"| {kind} | {workers} | {speed:.2f} | {seconds:.2f} | {100 * figures['waiting']:.1f} % |")


if __name__ == "__main__":
    main()
