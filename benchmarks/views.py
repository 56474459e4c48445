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
- PSNR: to the mean of 8 x 8 bilinear samples a pixel of the panorama decoded at full size, computed here from plain
  formulas; of the eight tiles together, mean over the mosaics. The global view is compared with the exact mean over
  areas; py360convert has no such view, and Pillow's filter, used with it, is a triangle: softer, which is no fault.

Two cores and memory are measured for the smallest views, arrays up to 4,096 columns, so that all takes minutes. Exits
with 1 where a claim that the project makes does not hold.
"""

from __future__ import annotations

import argparse
import importlib
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
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from panorama_vlm.benchmarks.overlap_loss import peak_resident, reset_peak_resident
from panorama_vlm.geometry_panorama import ViewOptions
from panorama_vlm.image_processing_panorama import PanoramaImageProcessor
from panorama_vlm.reading_panorama import read_panorama
from panorama_vlm.sampling_panorama import erp_to_views, needed_width
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]
try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Source = Path | np.ndarray
SAMPLES = Path(__file__).resolve().parent.parent / "samples"
INSTALL = "pip install py360convert==1.0.4 opencv-python-headless simplejpeg && pip install --no-deps pyequilib==0.6.0"
PROCESSES = 3  # one after the other
TILES = 8  # of 90 degrees, around the horizon, the first one in front
PLAN = ViewOptions("anyres_e2p", 90.0, 0.5).plan
FILE, ARRAY = "file", "array"
CLAIMED_FILE, CLAIMED_ARRAY = (4096, 256), (2048, 256)  # (columns of the panorama, side of the views) of the claims


class Job(NamedTuple):
    """A panorama of `width` columns, as a JPEG file or a decoded array, to views of `side` x `side` pixels."""

    kind: str
    width: int
    side: int


class Times(NamedTuple):
    """Panoramas a second."""

    median: float
    best: float


# The ways


@lru_cache(maxsize=4)
def processor(side: int) -> PanoramaImageProcessor:
    return PanoramaImageProcessor(image_size=side)


def ours(source: Source, side: int) -> torch.Tensor:
    return processor(side)(source, return_tensors="pt")["pixel_values"][0]


def ours_torch_only(source: Source, side: int) -> torch.Tensor:
    """Read as always, sampled by torch."""
    pixels = read_panorama(source, needed_width(PLAN, side)).pixels
    views = erp_to_views(pixels.permute(2, 0, 1), PLAN, side, backend="torch")
    return views.sub_(127.5).div_(127.5)


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
    places = (np.broadcast_arrays(*place) for place in tile_places(width, height, side))
    return [cv2.convertMaps(x.astype(np.float32), y.astype(np.float32), cv2.CV_16SC2) for x, y in places]


def by_opencv(source: Source, side: int) -> torch.Tensor:
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


def bare_decode(source: Source, side: int) -> np.ndarray:
    """A JPEG file at the reduced scale at which we decode it, by the decoder we use, and nothing else: the limit."""
    assert isinstance(source, Path)
    image = Image.open(source)
    scale = next((scale for scale in (8, 4, 2) if image.width / scale >= needed_width(PLAN, side)), 1)
    width, height = image.width // scale, image.height // scale
    if simplejpeg is not None:
        pixels: np.ndarray = simplejpeg.decode_jpeg(source.read_bytes(), min_height=height, min_width=width)
        return pixels
    image.draft(image.mode, (width, height))
    return np.asarray(image)


OURS, TORCH, DECODE = "ours", "ours, sampled by torch", "bare decode"
PY360, ALIGNED, EQUILIB, REMAP = "py360convert", "py360convert, aligned", "pyequilib", "OpenCV remap"
WAYS: dict[str, Callable[[Source, int], Any]] = {
    DECODE: bare_decode,
    OURS: ours,
    TORCH: ours_torch_only,
    PY360: by_py360convert,
    ALIGNED: by_py360convert_aligned,
    EQUILIB: by_pyequilib,
    REMAP: by_opencv,
}
NEEDS = {
    OURS: "cv2",
    PY360: "py360convert",
    ALIGNED: "py360convert",
    EQUILIB: "equilib",
    REMAP: "cv2",
}
PACKAGES = {"cv2": "opencv-python-headless", "equilib": "pyequilib", "py360convert": "py360convert"}


def missing() -> dict[str, str]:
    """Why a module that a way needs cannot be imported."""
    found = {}
    for module in dict.fromkeys(NEEDS.values()):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a peer raises is to be shown, not to end the run
            found[module] = f"{type(error).__name__}: {error}"
    return found


def ways_of(job: Job) -> list[str]:
    """The ways that can do a job and can be imported. `ALIGNED` is left to :func:`quality_of`: it takes what `PY360`
    takes, and in turns with it neither would find its maps prepared."""
    absent = missing()
    apart = {ALIGNED, DECODE} if job.kind == ARRAY else {ALIGNED}
    return [way for way in WAYS if NEEDS.get(way) not in absent and way not in apart]


# Panoramas and the reference


def mosaic(width: int, seed: int, tile: tuple[int, int] = (512, 256)) -> Image.Image:
    """The twelve samples side by side at their own resolution, in an order of the seed's: `width` x `width / 2`."""
    samples = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    rng = np.random.default_rng(seed)
    whole = Image.new("RGB", (width, width // 2))
    order: list[int] = []
    for top in range(0, width // 2, tile[1]):
        for left in range(0, width, tile[0]):
            order = order or list(rng.permutation(len(samples)))
            whole.paste(samples[order.pop()], (left, top))
    return whole


def write_mosaics(folder: Path, widths: Sequence[int], mosaics: int) -> dict[int, list[Path]]:
    """JPEG files of quality 92 (4:2:0), by width."""
    files = {width: [folder / f"{width}_{seed}.jpg" for seed in range(mosaics)] for width in widths}
    for width, paths in files.items():
        for seed, path in enumerate(paths):
            mosaic(width, seed).save(path, quality=92)
    return files


def tile_places(width: int, height: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each tile, in the panorama, the column of its columns, in [-1/2, width - 1/2), [side], and the row of its
    pixels, [side, side]."""
    x = (np.arange(side) + 0.5) / side * 2 - 1  # tangents; tan(90 / 2) is 1
    yaw, pitch = np.arctan(x), np.arctan(-x[:, None] / np.hypot(x, 1))
    row = (0.5 - pitch / math.pi) * height - 0.5
    for k in range(TILES):
        yield (yaw / (2 * math.pi) + k / TILES + 0.5) % 1 * width - 0.5, row


def reference(image: np.ndarray, side: int, samples: int = 8) -> torch.Tensor:
    """What the views of [H, W, 3] should be, [9, 3, side, side] in [0, 255]: the means of samples x samples bilinear
    samples a pixel for tiles, the mean over the area of a pixel for the global view."""
    height, width = image.shape[:2]
    wrapped = torch.from_numpy(np.concatenate([image[:, -1:], image, image[:, :1]], 1)).permute(2, 0, 1)[None].float()
    views = [torch.from_numpy(area_mean(area_mean(image, side).swapaxes(0, 1), side)).permute(2, 1, 0).float()]
    grid = torch.empty(1, samples * side, samples * side, 2)  # column and row in [-1, 1]
    for column, row in tile_places(width, height, samples * side):
        grid[0, :, :, 0] = torch.from_numpy(2 * (column + 1) / (width + 1) - 1)
        grid[0, :, :, 1] = torch.from_numpy(2 * row / (height - 1) - 1)
        dense = F.grid_sample(wrapped, grid, align_corners=True)
        views.append(F.avg_pool2d(dense, samples)[0])
    return torch.stack(views)


def area_mean(cells: np.ndarray, new: int) -> np.ndarray:
    """Rows [old, ...] -> [new, ...]: the integral from edge to edge, over the length."""
    old = len(cells)
    integral = np.concatenate([np.zeros_like(cells[:1], np.float64), np.cumsum(cells, 0, dtype=np.float64)])
    edges = np.arange(new + 1) * (old / new)
    below = np.minimum(edges.astype(int), old - 1)
    share = (edges - below).reshape(-1, *[1] * (cells.ndim - 1))
    at_edges = integral[below] * (1 - share) + integral[below + 1] * share
    return np.diff(at_edges, axis=0) * (new / old)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB, of values in [0, 255]."""
    return 10 * math.log10(255**2 / max((a.double() - b.double()).square().mean().item(), 1e-12))


# Measurements


def fresh_processes() -> Any:
    """Makes processes in which everything is imported, and nothing has run."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    ours_and_torch = (
        "panorama_vlm.image_processing_panorama",
        "panorama_vlm.benchmarks.overlap_loss",
    )
    context.set_forkserver_preload([*ours_and_torch, *PACKAGES])
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
    return file if job.kind == FILE else np.array(Image.open(file))


def take_turns(
    jobs: Sequence[tuple[Job, Path]], repeats: int, core: int, barrier: Any, results: Any, title: str
) -> None:
    """Seconds of each way of each job, in a process of its own."""
    tie_to_core(core)
    seconds: dict[tuple[Job, str], list[float]] = {}
    for job, file in tqdm(jobs, desc=title, disable=core != 0):
        source = load(job, file)
        ways = ways_of(job)
        turns = repeats if job.width <= 4096 else (repeats + 1) // 2
        for turn in range(turns + 1):
            for way in ways:
                barrier.wait()
                start = time.perf_counter()
                WAYS[way](source, job.side)
                if turn:  # the first one prepares maps
                    seconds.setdefault((job, way), []).append(time.perf_counter() - start)
    results.put(seconds)


def throughput(jobs: Sequence[tuple[Job, Path]], repeats: int, cores: int) -> dict[tuple[Job, str], Times]:
    """Panoramas a second of one process on each of the cores, all together; in fresh processes several times, because
    where the memory of a process lies changes its speed by a tenth."""
    context = fresh_processes()
    seconds: dict[tuple[Job, str], list[float]] = {}
    for again in range(PROCESSES):
        barrier, results = context.Barrier(cores), context.Queue()
        title = f"speed, {cores} core{'s' * (cores > 1)}, {again + 1} of {PROCESSES}"
        workers = [
            context.Process(target=take_turns, args=(jobs, repeats, core, barrier, results, title))
            for core in range(cores)
        ]
        for worker in workers:
            worker.start()
        try:
            for _ in workers:
                for key, measured in results.get(timeout=1800).items():
                    seconds.setdefault(key, []).extend(measured)
        finally:
            for worker in workers:
                worker.join(timeout=10)
                worker.terminate()
    return {key: Times(cores / statistics.median(turns), cores / min(turns)) for key, turns in seconds.items()}


def peak_of(task: tuple[Job, Path, str]) -> tuple[Job, str, float]:
    """MiB that a way needs above what there is before it. Call it in a fresh process."""
    job, file, way = task
    tie_to_core(None)
    source = load(job, file)
    tiny = np.zeros((32, 64, 3), np.uint8)
    Image.fromarray(tiny).save(head := io.BytesIO(), "JPEG")
    Image.open(head).load()
    if way != DECODE:
        WAYS[way](tiny, 16)
    before = reset_peak_resident()
    for _ in range(3):
        WAYS[way](source, job.side)
    return job, way, (peak_resident() - before) / 2**20


def peak_memory(jobs: Sequence[tuple[Job, Path]], processes: int = 2) -> dict[tuple[Job, str], float]:
    tasks = [(job, file, way) for job, file in jobs for way in ways_of(job)]
    with fresh_processes().Pool(processes, maxtasksperchild=1) as pool:
        found = tqdm(pool.imap(peak_of, tasks, chunksize=1), desc="peak memory", total=len(tasks))
        return {(job, way): mebibytes for job, way, mebibytes in found}


def quality_of(task: tuple[list[Job], Path]) -> dict[tuple[Job, str], tuple[float, float]]:
    """PSNR in dB of (the tiles, the global view), of jobs of one width and side."""
    jobs, file = task
    tie_to_core(None)
    image = np.array(Image.open(file))
    target = reference(image, jobs[0].side)
    found = {}
    for job in jobs:
        for way in [*ways_of(job), *([ALIGNED] if "py360convert" not in missing() else [])]:
            if way != DECODE:
                views = WAYS[way](file if job.kind == FILE else image, job.side) * 127.5 + 127.5
                found[job, way] = (psnr(views[1:], target[1:]), psnr(views[:1], target[:1]))
    return found


def quality(jobs: Sequence[Job], files: dict[int, list[Path]]) -> dict[tuple[Job, str], tuple[float, float]]:
    """`quality_of` each job, mean over the mosaics."""
    alike = [[job for job in jobs if job[1:] == key] for key in dict.fromkeys(job[1:] for job in jobs)]
    tasks = [(group, file) for group in alike for file in files[group[0].width]]
    with fresh_processes().Pool(2) as pool:
        found = list(tqdm(pool.imap(quality_of, tasks), desc="PSNR", total=len(tasks)))
    values: dict[tuple[Job, str], list[tuple[float, float]]] = {}
    for measured in found:
        for key, pair in measured.items():
            values.setdefault(key, []).append(pair)
    return {
        key: (statistics.mean(tiles for tiles, _ in pairs), statistics.mean(whole for _, whole in pairs))
        for key, pairs in values.items()
    }


# The table


class Measured(NamedTuple):
    """By job and way."""

    one: dict[tuple[Job, str], Times]
    two: dict[tuple[Job, str], Times]
    memory: dict[tuple[Job, str], float]
    quality: dict[tuple[Job, str], tuple[float, float]]


def show(times: Times) -> str:
    return f"{times.median:.1f} ({times.best:.1f})"


def print_table(measured: Measured, kind: str) -> None:
    """One line a job and way."""
    jobs = dict.fromkeys(job for job, _ in measured.one if job.kind == kind)
    keys = [key for job in jobs for way in WAYS if (key := (job, way)) in measured.one or key in measured.quality]
    source = {FILE: "JPEG file", ARRAY: "decoded array"}[kind]
    print(f"\nFrom a {source}; panoramas/s: median (best), MiB: peak above the imports, dB: PSNR to the reference:\n")
    print("| panorama | views | way | 1 core | 2 cores | MiB | dB tiles | dB global |")
    print("|---|--:|---|--:|--:|--:|--:|--:|")
    for key in keys:
        job, way = key
        memory = f"{measured.memory[key]:.0f}" if key in measured.memory else ""
        dB = [f"{value:.1f}" for value in measured.quality[key]] if key in measured.quality else ["", ""]
        name = f"**{way}**" if way == OURS else way
        cells = [f"{job.width} x {job.width // 2}", str(job.side), name]
        cells += [show(times[key]) if key in times else "" for times in (measured.one, measured.two)]
        print("|", " | ".join([*cells, memory, *dB]), "|")


def print_limit(measured: Measured) -> None:
    """Our time from file to views beside that of the bare decode."""
    ratios = [
        f"{measured.one[job, DECODE].median / measured.one[job, OURS].median:.2f} ({job.width} to {job.side})"
        for job in dict.fromkeys(job for job, _ in measured.one)
        if job.kind == FILE and (job, OURS) in measured.one
    ]
    print(f"\nFrom file to views ours takes this many times as long as the bare decode, one core: {', '.join(ratios)}.")


class Claim(NamedTuple):
    """`figure` has to be `at_least` this."""

    text: str
    figure: float
    at_least: float

    @property
    def holds(self) -> bool:
        return self.figure >= self.at_least


def claims(measured: Measured) -> list[Claim]:
    """What the project says, as far as it was measured."""
    found = []
    file, array = Job(FILE, *CLAIMED_FILE), Job(ARRAY, *CLAIMED_ARRAY)

    def speed(job: Job, way: str, other: str) -> list[float]:
        counts = [measured.one, measured.two] if (job, way) in measured.two else [measured.one]
        return [times[job, way].median / times[job, other].median for times in counts]

    where = "from a {1} x {0} file to {2} pixels".format(file.width // 2, *file[1:])
    if {(file, OURS), (file, PY360)} <= measured.one.keys():
        for cores, ratio in enumerate(speed(file, OURS, PY360), start=1):
            found.append(Claim(f"{where}: times as fast as py360convert, {cores} core(s)", ratio, 3.5))
        for other, least in ((PY360, 14), (ALIGNED, 13)):
            closer = measured.quality[file, OURS][0] - measured.quality[file, other][0]
            found.append(Claim(f"{where}: dB closer to the reference than {other}", closer, least))
        if (file, OURS) in measured.memory:
            saved = measured.memory[file, PY360] / measured.memory[file, OURS]
            found.append(Claim(f"{where}: py360convert needs so many times our peak memory", saved, 2))
    where = "from a {1} x {0} array to {2} pixels".format(array.width // 2, *array[1:])
    if {(array, OURS), (array, PY360)} <= measured.one.keys():
        for cores, ratio in enumerate(speed(array, OURS, PY360), start=1):
            found.append(Claim(f"{where}: times as fast as py360convert, {cores} core(s)", ratio, 1))
        closer = measured.quality[array, OURS][0] - measured.quality[array, ALIGNED][0]
        found.append(Claim(f"{where}: dB closer to the reference than {ALIGNED}", closer, 0))
    return found


def print_claims(found: Sequence[Claim]) -> bool:
    """Whether all hold."""
    print("\n| claim | measured | at least | |\n|---|--:|--:|---|")
    for claim in found:
        verdict = "holds" if claim.holds else "**FAILS**"
        print(f"| {claim.text} | {claim.figure:.2f} | {claim.at_least:g} | {verdict} |")
    failed = [claim for claim in found if not claim.holds]
    for claim in failed:
        message = f"claim fails: {claim.text}: {claim.figure:.2f}, must be at least {claim.at_least:g}"
        print(message, file=sys.stderr)
    return not failed


def print_header(repeats: int, mosaics: int) -> None:
    absent = missing()
    names = [
        "torch",
        "pillow",
        *(["simplejpeg"] if simplejpeg else []),
        *(PACKAGES[module] for module in PACKAGES if module not in absent),
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"Panoramas to the nine views of anyres_e2p; {versions}; {os.cpu_count()} CPUs.")
    print(
        f"Ways take turns, median (best) of {PROCESSES} x {repeats}; one thread a process, on two cores two processes. "
        f"Memory: fresh process, maps included. PSNR: mean over {mosaics} mosaic(s)."
    )
    for module, reason in absent.items():
        left_out = ", ".join(way for way, needed in NEEDS.items() if needed == module)
        print(f"\nLEFT OUT: {left_out}: {PACKAGES[module]} cannot be imported ({reason}). {INSTALL}")


def measure(arguments: argparse.Namespace, folder: Path) -> Measured:
    """Everything in the tables; prints the rest on its way."""
    files = write_mosaics(folder, arguments.sizes, arguments.mosaics)
    jobs = [Job(FILE, width, side) for width in arguments.sizes for side in arguments.views]
    jobs += [Job(ARRAY, *job[1:]) for job in jobs if job.width <= 4096]
    first = [(job, files[job.width][0]) for job in jobs]
    small = [(job, file) for job, file in first if job.side == min(arguments.views)]
    memory = peak_memory(small)
    one, two = throughput(first, arguments.repeats, 1), throughput(small, arguments.repeats, 2)
    return Measured(one, two, memory, quality(jobs, files))


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed, memory and quality of the views beside other libraries.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192], help="columns of the panoramas")
    parser.add_argument("--views", type=int, nargs="+", default=[256, 384], help="sides of the views in pixels")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help=f"turns of each way in each of {PROCESSES} processes, half as many above 4,096 columns (default: 3)",
    )
    parser.add_argument("--mosaics", type=int, default=3, help="panoramas that PSNR is the mean of (default: 3)")
    parser.add_argument("--smoke", action="store_true", help="one tiny size, once; no claim is checked")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.sizes, arguments.views, arguments.repeats, arguments.mosaics = [512], [32], 1, 1

    print_header(arguments.repeats, arguments.mosaics)
    with tempfile.TemporaryDirectory() as name:
        measured = measure(arguments, Path(name))
    for kind in (FILE, ARRAY):
        print_table(measured, kind)
    print_limit(measured)
    found = claims(measured)
    if not found:
        print("\nThe sizes and ways of this run say nothing about a claim.")
        return 0
    return 0 if print_claims(found) else 1


if __name__ == "__main__":
    sys.exit(main())
