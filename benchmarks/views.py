"""From JPEG files and decoded arrays to the nine normalised views of `anyres_e2p`, beside the ways others take.

    pip install py360convert==1.0.4 opencv-python-headless simplejpeg && pip install --no-deps pyequilib==0.6.0
    python -m panorama_vlm.benchmarks.views [--sizes 2048 4096 8192] [--views 256 384] [--repeats 3] [--mosaics 3]

Each way gives float32 [9, 3, side, side], mean and standard deviation 0.5, from the same files: mosaics of the twelve
real panorama samples at their own resolution, so that there is real detail at every size. In one run:

- Speed: the ways take turns, so that a busy moment of the machine hits all of them; shown are the median and, in
  brackets, the best, of three fresh processes. One core is one process with one thread, tied to a core; two cores are
  two such processes, which start each turn together. Ratios are of medians. Maps are prepared in a turn that is not
  counted, for all who keep them.
- Peak memory: the most memory of a fresh process (VmHWM on Linux, else ru_maxrss) in three runs of the job, above
  what it has after the imports and one tiny panorama, which loads libraries (and with the array, where that is the
  source). Prepared maps count.
- dB: PSNR to the mean of 8 x 8 bilinear samples a pixel of the panorama decoded at full size, computed here from plain
  formulas; of the eight tiles together, mean over the mosaics.

Two cores and memory are measured for the smallest views, arrays up to 4,096 columns, so that all takes minutes. Exits
with 1 where a claim that the project makes does not hold.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from panorama_vlm.benchmarks.overlap_loss import peak_resident, reset_peak_resident
from panorama_vlm.image_processing_panorama import PanoramaImageProcessor
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

Source = Path | np.ndarray
SAMPLES = Path(__file__).resolve().parent.parent / "samples"
PROCESSES = 3  # one after the other
TILES = 8  # of 90 degrees, around the horizon, the first one in front
PACKAGES = ("torch", "pillow", "simplejpeg", "opencv-python-headless", "py360convert", "pyequilib")
FILE, ARRAY = "JPEG file", "decoded array"
CLAIMED_FILE, CLAIMED_ARRAY = (4096, 256), (2048, 256)  # (columns of the panorama, side of the views) of the claims


class Job(NamedTuple):
    """A panorama of `width` columns, as a JPEG file or a decoded array, to views of `side` x `side` pixels."""

    kind: str
    width: int
    side: int


class Figures(NamedTuple):
    """What was measured of one way of one job.

    Args:
        dB: PSNR of the tiles to the reference.
        mebibytes: peak memory; NaN where it was not measured.
        speeds: panoramas a second, (median, best), on one core and, where that was measured, on two.
    """

    dB: float
    mebibytes: float
    speeds: list[tuple[float, float]]


Task = tuple[Job, Path, list[str]]  # a job, its file and the ways to do it
Seconds = dict[tuple[Job, str], list[float]]
Measured = dict[tuple[Job, str], Figures]


# The ways


@lru_cache(maxsize=4)
def processor(side: int) -> PanoramaImageProcessor:
    """As it comes: `anyres_e2p`, 90 degrees, overlap 0.5."""
    return PanoramaImageProcessor(image_size=side)


def ours(source: Source, side: int) -> torch.Tensor:
    """The image processor, with OpenCV and simplejpeg where they are installed."""
    return processor(side)(source, return_tensors="pt")["pixel_values"][0]


def by_py360convert(source: Source, side: int, fov: float = 90.0) -> torch.Tensor:
    """With its own cache of maps and, inside, OpenCV where that is installed."""
    import py360convert

    image = np.asarray(Image.open(source)) if isinstance(source, Path) else source
    tiles = [
        py360convert.e2p(image, fov, (360 / TILES * k + 180) % 360 - 180, 0, (side, side), mode="bilinear")
        for k in range(TILES)
    ]
    whole = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    return normalised([whole, *tiles])


def by_py360convert_aligned(source: Source, side: int) -> torch.Tensor:
    """Its outermost samples lie on the borders of the tile, not in the middle of the outermost pixels: here the field
    of view is narrowed by what puts them there, so that only its sampling is judged."""
    return by_py360convert(source, side, 2 * math.degrees(math.atan(1 - 1 / side)))


@lru_cache(maxsize=4)
def equi2pers(side: int) -> Any:
    """pyequilib's transform, made once."""
    from equilib import Equi2Pers

    return Equi2Pers(side, side, 90.0, mode="bilinear", clip_output=False)


def by_pyequilib(source: Source, side: int) -> torch.Tensor:
    """All tiles in one batch of float32 in torch, without its clipping of the output: four times as fast as with
    uint8. Its grid lies half a pixel of the tile and one of the panorama aside; the camera is turned back by that."""
    image = np.asarray(Image.open(source)) if isinstance(source, Path) else source
    image = image if image.flags.writeable else image.copy()
    erp = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    aside = 1 / side - 2 * math.pi / image.shape[1]  # radians
    rotations = [
        {"roll": 0.0, "pitch": aside, "yaw": -(2 * math.pi * k / TILES + aside)}  # its yaw turns left
        for k in range(TILES)
    ]
    views = torch.empty(1 + TILES, 3, side, side)
    views[1:] = equi2pers(side)(erp.expand(TILES, -1, -1, -1), rotations)
    views[:1] = F.interpolate(erp, (side, side), mode="area")
    return views.sub_(127.5).div_(127.5)


@lru_cache(maxsize=4)
def prepared_maps(width: int, height: int, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """OpenCV's maps of the tiles, in the form in which it samples fastest."""
    places = (np.broadcast_arrays(*place) for place in tile_places(width, height, side))
    return [cv2.convertMaps(x.astype(np.float32), y.astype(np.float32), cv2.CV_16SC2) for x, y in places]


def by_opencv(source: Source, side: int) -> torch.Tensor:
    """One bilinear sample a pixel by prepared maps, nothing reduced first: the least that OpenCV can do."""
    image: Any = cv2.imread(str(source), cv2.IMREAD_COLOR_RGB) if isinstance(source, Path) else source
    maps = prepared_maps(image.shape[1], image.shape[0], side)
    tiles = [cv2.remap(image, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP) for places in maps]
    return normalised([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), *tiles])


def normalised(views: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 [side, side, 3] each -> [V, 3, side, side], as fast as we know."""
    out = torch.empty(len(views), 3, *views[0].shape[:2])
    for place, view in zip(out, views, strict=True):
        place.copy_(torch.from_numpy(view).permute(2, 0, 1))
    return out.sub_(127.5).div_(127.5)


OURS = "ours"
PY360, ALIGNED, EQUILIB, REMAP = "py360convert", "py360convert, aligned", "pyequilib", "OpenCV remap"
WAYS: dict[str, Callable[[Source, int], Any]] = {
    OURS: ours,
    PY360: by_py360convert,
    ALIGNED: by_py360convert_aligned,
    EQUILIB: by_pyequilib,
    REMAP: by_opencv,
}


def missing() -> dict[str, str]:
    """Why a way cannot run here, for those that cannot."""
    found = {}
    for way, function in WAYS.items():
        try:
            function(np.zeros((32, 64, 3), np.uint8), 16)
        except Exception as error:  # whatever a peer raises is to be shown, not to end the run
            found[way] = f"{type(error).__name__}: {error}"
    return found


# Panoramas and the reference


def mosaic(width: int, seed: int) -> Image.Image:
    """The twelve samples side by side at their own resolution, in an order of the seed's: `width` x `width / 2`."""
    samples = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    rng = np.random.default_rng(seed)
    whole = Image.new("RGB", (width, width // 2))
    order: list[int] = []
    for top in range(0, width // 2, 256):
        for left in range(0, width, 512):
            order = order or list(rng.permutation(len(samples)))
            whole.paste(samples[order.pop()], (left, top))
    return whole


def tile_places(width: int, height: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each tile, in the panorama, the column of its columns, in [-1/2, width - 1/2), [side], and the row of its
    pixels, [side, side]."""
    x = (np.arange(side) + 0.5) / side * 2 - 1  # tangents; tan(90 / 2) is 1
    yaw, pitch = np.arctan(x), np.arctan(-x[:, None] / np.hypot(x, 1))
    row = (0.5 - pitch / math.pi) * height - 0.5
    for k in range(TILES):
        yield (yaw / (2 * math.pi) + k / TILES + 0.5) % 1 * width - 0.5, row


def reference(image: np.ndarray, side: int, samples: int = 8) -> torch.Tensor:
    """What the tiles of [H, W, 3] should be, [8, 3, side, side] in [0, 255]: the means of samples x samples bilinear
    samples a pixel."""
    height, width = image.shape[:2]
    wrapped = torch.from_numpy(np.concatenate([image[:, -1:], image, image[:, :1]], 1)).permute(2, 0, 1)[None].float()
    tiles = []
    grid = torch.empty(1, samples * side, samples * side, 2)  # column and row in [-1, 1]
    for column, row in tile_places(width, height, samples * side):
        grid[0, :, :, 0] = torch.from_numpy(2 * (column + 1) / (width + 1) - 1)
        grid[0, :, :, 1] = torch.from_numpy(2 * row / (height - 1) - 1)
        dense = F.grid_sample(wrapped, grid, align_corners=True)
        tiles.append(F.avg_pool2d(dense, samples)[0])
    return torch.stack(tiles)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB, of values in [0, 255]."""
    return 10 * math.log10(255**2 / max((a.double() - b.double()).square().mean().item(), 1e-12))


# Measurements


def fresh_processes() -> Any:
    """Makes processes in which everything is imported, and nothing has run."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["panorama_vlm.benchmarks.views", "cv2", "equilib", "py360convert"])
    return context


def tie_to_core(index: int | None) -> None:
    """One thread, and where the system can do it, one core."""
    torch.set_num_threads(1)
    if cv2 is not None:
        cv2.setNumThreads(1)
    if index is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def load(job: Job, file: Path) -> Source:
    """What a job starts from."""
    return file if job.kind == FILE else np.array(Image.open(file))


def take_turns(tasks: Sequence[Task], repeats: int, core: int, barrier: Any) -> Seconds:
    """Seconds of each way of each job, in a process of its own that starts each turn together with the others."""
    tie_to_core(core)
    seconds: Seconds = {}
    for job, file, ways in tasks:
        source = load(job, file)
        turns = repeats if job.width <= 4096 else (repeats + 1) // 2
        for turn in range(turns + 1):
            for way in ways:
                barrier.wait()
                start = time.perf_counter()
                WAYS[way](source, job.side)
                if turn:  # the first one prepares maps
                    seconds.setdefault((job, way), []).append(time.perf_counter() - start)
    return seconds


def throughput(tasks: Sequence[Task], repeats: int, cores: int) -> dict[tuple[Job, str], tuple[float, float]]:
    """Panoramas a second, (median, best), of one process on each of the cores, all together; in fresh processes several
    times, because where the memory of a process lies changes its speed by a tenth."""
    context = fresh_processes()
    seconds: Seconds = {}
    for _ in tqdm(range(PROCESSES), desc=f"speed, cores: {cores}"):
        with context.Manager() as manager, context.Pool(cores) as pool:
            barrier = manager.Barrier(cores, timeout=600)  # ends the run if the other process has
            workers = [(tasks, repeats, core, barrier) for core in range(cores)]
            for measured in pool.starmap(take_turns, workers, chunksize=1):
                for key, each in measured.items():
                    seconds.setdefault(key, []).extend(each)
    return {key: (cores / statistics.median(turns), cores / min(turns)) for key, turns in seconds.items()}


def peak_of(task: tuple[Job, Path, str]) -> float:
    """MiB that a way needs above what there is before it. Call it in a fresh process."""
    job, file, way = task
    tie_to_core(None)
    source = load(job, file)
    tiny = np.zeros((32, 64, 3), np.uint8)
    Image.fromarray(tiny).save(head := io.BytesIO(), "JPEG")
    Image.open(head).load()
    WAYS[way](tiny, 16)
    before = reset_peak_resident()
    for _ in range(3):
        WAYS[way](source, job.side)
    return (peak_resident() - before) / 2**20


def peak_memory(tasks: Sequence[Task]) -> dict[tuple[Job, str], float]:
    """`peak_of` each way of each job."""
    each = [(job, file, way) for job, file, ways in tasks for way in ways]
    with fresh_processes().Pool(2, maxtasksperchild=1) as pool:
        peaks = list(tqdm(pool.imap(peak_of, each, chunksize=1), desc="peak memory", total=len(each)))
    return {(job, way): peak for (job, _, way), peak in zip(each, peaks, strict=True)}


def quality(tasks: Sequence[Task]) -> dict[tuple[Job, str], float]:
    """PSNR of the tiles in dB, mean over the files of a job."""
    targets: dict[tuple[Path, int], torch.Tensor] = {}
    values: dict[tuple[Job, str], list[float]] = {}
    for job, file, ways in tqdm(tasks, desc="PSNR"):
        if (file, job.side) not in targets:
            targets[file, job.side] = reference(np.array(Image.open(file)), job.side)
        for way in ways:
            tiles = WAYS[way](load(job, file), job.side)[1:] * 127.5 + 127.5
            values.setdefault((job, way), []).append(psnr(tiles, targets[file, job.side]))
    return {key: statistics.mean(each) for key, each in values.items()}


def measure(jobs: Sequence[Job], files: dict[int, list[Path]], repeats: int, able: Sequence[str]) -> Measured:
    """The figures of each way that is able to do each job. `ALIGNED` takes what `PY360` takes, and in turns with it
    neither would find its maps prepared: only its quality is measured."""
    every: list[Task] = [(job, file, list(able)) for job in jobs for file in files[job.width]]
    timed = [way for way in able if way != ALIGNED]
    first: list[Task] = [(job, files[job.width][0], timed) for job in jobs]
    small = [task for task in first if task[0].side == min(job.side for job in jobs)]
    memory, dB = peak_memory(small), quality(every)
    one, two = throughput(first, repeats, 1), throughput(small, repeats, 2)
    return {
        key: Figures(dB[key], memory.get(key, math.nan), [speeds[key] for speeds in (one, two) if key in speeds])
        for key in dB
    }


# The table


def print_table(measured: Measured, kind: str) -> None:
    """One line a job and way."""
    print(f"\nFrom a {kind}; panoramas/s: median (best), MiB: peak above the imports, dB: PSNR of the tiles:\n")
    print("| panorama | views | way | 1 core | 2 cores | MiB | dB |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for (job, way), figures in measured.items():
        if job.kind == kind:
            cells = [f"{job.width} x {job.width // 2}", str(job.side), f"**{way}**" if way == OURS else way]
            speeds = [f"{median:.1f} ({best:.1f})" for median, best in figures.speeds]
            cells += [*speeds, "", ""][:2]
            cells += ["" if math.isnan(figures.mebibytes) else f"{figures.mebibytes:.0f}", f"{figures.dB:.1f}"]
            print("|", " | ".join(cells), "|")


class Claim(NamedTuple):
    """`figure` has to be `at_least` this."""

    text: str
    figure: float
    at_least: float

    @property
    def holds(self) -> bool:
        """Whether it is."""
        return self.figure >= self.at_least


def claims(measured: Measured) -> list[Claim]:
    """What the project says, as far as it was measured."""
    found = []
    for job, faster, smaller, closer in (
        (Job(FILE, *CLAIMED_FILE), 3.5, 2.0, {PY360: 14, ALIGNED: 13}),
        (Job(ARRAY, *CLAIMED_ARRAY), 1, math.nan, {ALIGNED: 0}),
    ):
        if not {(job, OURS), (job, PY360)} <= measured.keys():
            continue
        where = f"from a {job.width} x {job.width // 2} {job.kind} to {job.side} pixels"
        mine, theirs = measured[job, OURS], measured[job, PY360]
        for cores, (speed, other) in enumerate(zip(mine.speeds, theirs.speeds, strict=True), start=1):
            text = f"{where}: times as fast as py360convert, {cores} core(s)"
            found.append(Claim(text, speed[0] / other[0], faster))
        for way, least in closer.items():
            found.append(
                Claim(f"{where}: dB closer to the reference than {way}", mine.dB - measured[job, way].dB, least)
            )
        saved = theirs.mebibytes / mine.mebibytes
        if not math.isnan(saved + smaller):
            found.append(Claim(f"{where}: py360convert needs so many times our peak memory", saved, smaller))
    return found


def print_claims(found: Sequence[Claim]) -> bool:
    """Whether all hold."""
    print("\n| claim | measured | at least | |\n|---|--:|--:|---|")
    for claim in found:
        print(f"| {claim.text} | {claim.figure:.2f} | {claim.at_least:g} | {'holds' if claim.holds else '**FAILS**'} |")
    return all(claim.holds for claim in found)


def print_header(repeats: int, mosaics: int, absent: dict[str, str]) -> None:
    """What is compared, with which versions, and what is left out."""
    versions = {package.name: f"{package.name} {package.version}" for package in distributions()}
    used = ", ".join(versions.get(name, f"no {name}") for name in PACKAGES)
    print(f"Panoramas to the nine views of anyres_e2p; {used}; {os.cpu_count()} CPUs.")
    print(f"Ways take turns, {PROCESSES} processes x {repeats}, one thread each; dB: mean over {mosaics} mosaic(s).")
    for way, reason in absent.items():
        print(f"\nLEFT OUT: {way} ({reason}); the top of this file says what to install.")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description="Speed, memory and quality of the views beside other libraries.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192], help="columns of the panoramas")
    parser.add_argument("--views", type=int, nargs="+", default=[256, 384], help="sides of the views in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="turns in each process; half above 4,096 columns (3)")
    parser.add_argument("--mosaics", type=int, default=3, help="panoramas that PSNR is the mean of (default: 3)")
    options = parser.parse_args(arguments)

    absent = missing()
    print_header(options.repeats, options.mosaics, absent)
    jobs = [Job(FILE, width, side) for width in options.sizes for side in options.views]
    jobs += [Job(ARRAY, *job[1:]) for job in jobs if job.width <= 4096]
    with tempfile.TemporaryDirectory() as folder:
        seeds = range(options.mosaics)
        files = {width: [Path(folder, f"{width}_{seed}.jpg") for seed in seeds] for width in options.sizes}
        for width, paths in files.items():
            for seed, path in enumerate(paths):
                mosaic(width, seed).save(path, quality=92)
        measured = measure(jobs, files, options.repeats, [way for way in WAYS if way not in absent])
    for kind in (FILE, ARRAY):
        print_table(measured, kind)
    found = claims(measured)
    if not found:
        print("\nThe sizes and ways of this run say nothing about a claim.")
    return 0 if not found or print_claims(found) else 1


if __name__ == "__main__":
    sys.exit(main())
