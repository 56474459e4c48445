"""What `vicreg` costs beside the same formula written plainly: time, memory, and how both grow.

    python -m panorama_vlm.benchmarks.overlap_loss [--quick] [--threads 1] [--device cuda]

Three ways to the same numbers, in one run: (a) the paper's D x D formula over all pairs at once, (b) the
same in chunks of 8 pairs, and `vicreg`. Time is forward and backward, the median over repetitions that take
turns, so that a busy moment of the machine hits all three. Peak extra memory is what one forward and backward
needs above the inputs, their gradients included; each figure comes from a process of its own.

Where other work keeps the cores busy, use fewer threads than there are free cores: threads that wait for each
other's turn at every operation cost `vicreg`, whose operations are short, most.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from panorama_vlm.losses_panorama import vicreg
from torch import Tensor
from torch.nn import functional as F

Terms = tuple[Tensor, ...]
EPS = 1e-4
CHUNK = 8


class Case(NamedTuple):
    """P pairs, L matched tokens a pair, D dimensions."""

    pairs: int
    length: int
    dim: int


TARGET = Case(32, 128, 1024)
GRID = [Case(pairs, 128, dim) for dim in (768, 1024) for pairs in (16, 32, 64)]
GROWTH = {
    "P": [TARGET._replace(pairs=pairs) for pairs in (8, 16, 32, 64)],
    "L": [TARGET._replace(length=length) for length in (32, 64, 128, 256)],
    "D": [TARGET._replace(dim=dim) for dim in (256, 512, 1024, 2048)],
}
QUICK = Case(16, 64, 512)
QUICK_GROWTH = {
    "P": [QUICK._replace(pairs=pairs) for pairs in (8, 16)],
    "L": [QUICK._replace(length=length) for length in (32, 64)],
    "D": [QUICK._replace(dim=dim) for dim in (256, 512)],
}


def plain(x: Tensor, y: Tensor) -> Terms:
    """Algorithm 1 of the VICReg paper for each pair of `[P, L, D]`, through the D x D covariance."""

    def variance_and_covariance(z: Tensor) -> tuple[Tensor, Tensor]:
        length, dim = z.shape[1:]
        std = torch.sqrt(z.var(1) + EPS)  # [P, D]
        z = z - z.mean(1, keepdim=True)
        covariance = z.mT @ z / (length - 1)  # [P, D, D]
        diagonal = covariance.diagonal(dim1=1, dim2=2)  # [P, D]
        off_diagonal = covariance.square().sum((1, 2)) - diagonal.square().sum(1)
        return F.relu(1 - std).mean(1), off_diagonal / dim

    (var_x, cov_x), (var_y, cov_y) = variance_and_covariance(x), variance_and_covariance(y)
    return (x - y).square().mean((1, 2)), var_x + var_y, cov_x + cov_y


def plain_in_chunks(x: Tensor, y: Tensor) -> Terms:
    """`plain`, 8 pairs at a time."""
    chunks = [plain(a, b) for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)]
    return tuple(torch.cat(term) for term in zip(*chunks, strict=True))


def ours(x: Tensor, y: Tensor) -> Terms:
    return vicreg(x, y, eps=EPS)


VARIANTS: dict[str, Callable[[Tensor, Tensor], Terms]] = {
    "plain": plain,
    "chunks": plain_in_chunks,
    "ours": ours,
}


def features(case: Case, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(case, generator=generator).to(device).requires_grad_() for _ in range(2))
    return x, y


def step(variant: str, x: Tensor, y: Tensor) -> float:
    """One forward and backward; returns the loss, which also waits for the device."""
    x.grad = y.grad = None
    invariance, variance, covariance = VARIANTS[variant](x, y)
    loss = (25 * invariance + 25 * variance + covariance).mean()
    loss.backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return loss.item()


def milliseconds(case: Case, variants: Iterable[str], repetitions: int, device: str) -> dict[str, float]:
    """Median time of `step` for each variant, which take turns after one warm-up each."""
    x, y = features(case, device)
    losses = {variant: step(variant, x, y) for variant in variants}
    low, high = min(losses.values()), max(losses.values())
    if high - low > 1e-5 * high:
        raise RuntimeError(f"the variants disagree at {case}: {losses}")
    times: dict[str, list[float]] = {variant: [] for variant in losses}
    for _ in range(repetitions):
        for variant in times:
            start = time.perf_counter()
            step(variant, x, y)
            times[variant].append(1e3 * (time.perf_counter() - start))
    return {variant: statistics.median(values) for variant, values in times.items()}


def peak_extra_bytes(variant: str, case: Case, device: str) -> int:
    """Peak memory of one `step` above what is there before it. Call it in a fresh process."""
    step(variant, *features(Case(2, 8, 8), device))  # thread pools and libraries are loaded
    x, y = features(case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(variant, x, y)
        return torch.cuda.max_memory_allocated() - before
    before = reset_peak_resident()
    step(variant, x, y)
    return peak_resident() - before


def reset_peak_resident() -> int:
    """Bytes of this process in memory now; Linux makes it the new peak, elsewhere it is the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return peak_resident()


def peak_resident() -> int:
    """The most bytes of this process that ever were in memory.

    Linux: `VmHWM`, because `ru_maxrss` also counts the parent's memory at the time of the fork.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mebibytes(case: Case, device: str) -> dict[str, float]:
    """`peak_extra_bytes` of each variant, each in a fresh process."""
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--device", device, "--peak-of", variant, *map(str, case)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[variant] = int(result.stdout) / 2**20
    return peaks


def print_comparison(cases: list[Case], repetitions: int, device: str) -> None:
    print("| P | L | D | (a) plain | (b) chunks | ours | (b)/ours | (a) mem | (b) mem | our mem | ours/(a) |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    verdict = ""
    for case in cases:
        times = milliseconds(case, VARIANTS, repetitions, device)
        peaks = mebibytes(case, device)
        faster, share = times["chunks"] / times["ours"], peaks["ours"] / peaks["plain"]
        cells = [f"{times[variant]:.1f} ms" for variant in VARIANTS] + [f"**{faster:.1f} x**"]
        cells += [f"{peaks[variant]:.0f} MiB" for variant in VARIANTS] + [f"**{share:.2f}**"]
        print("|", " | ".join([*map(str, case), *cells]), "|", flush=True)
        if case == TARGET:
            verdict = (
                f"\nAt P={case.pairs}, L={case.length}, D={case.dim}: {faster:.1f} times as fast as (b) "
                f"(target: 6), peak extra memory {share:.2f} of (a) (target: at most 0.25)."
            )
    print(verdict)


def print_growth(growth: dict[str, list[Case]], repetitions: int, device: str) -> None:
    print("| grows | P | L | D | (b) chunks | ours | (b) / ours | (b) grew | ours grew |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, cases in growth.items():
        last: dict[str, float] = {}
        for case in cases:
            times = milliseconds(case, ("chunks", "ours"), repetitions, device)
            cells = [f"{times[variant]:.1f} ms" for variant in times]
            cells += [f"{times['chunks'] / times['ours']:.1f} x"]
            cells += [f"{times[variant] / last[variant]:.1f} x" if last else "" for variant in times]
            print("|", " | ".join([name, *map(str, case), *cells]), "|", flush=True)
            last = times


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of vicreg beside the plain formula.")
    parser.add_argument("--quick", action="store_true", help="one small case, for a look or a test")
    parser.add_argument("--repetitions", type=int, default=5, help="the median of them is shown (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak-of", nargs=4, metavar=("VARIANT", "P", "L", "D"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)

    if arguments.peak_of:
        variant, *sizes = arguments.peak_of
        print(peak_extra_bytes(variant, Case(*map(int, sizes)), device))
        return

    where = f"{torch.get_num_threads()} torch threads, {os.cpu_count()} CPUs"
    memory = "of the process in memory (VmHWM on Linux, else ru_maxrss), a fresh process each"
    if device == "cuda":
        where, memory = torch.cuda.get_device_name(), "of the CUDA allocator, a fresh process each"
    print(f"VICReg overlap loss, forward + backward, float32; torch {torch.__version__}, {where}.")
    print(f"Median of {arguments.repetitions} interleaved repetitions. Memory: peak {memory}.\n")
    print_comparison([QUICK] if arguments.quick else GRID, arguments.repetitions, device)
    print('\nHow time grows, one size at a time ("grew": against the line before):\n')
    print_growth(QUICK_GROWTH if arguments.quick else GROWTH, arguments.repetitions, device)


if __name__ == "__main__":
    main()
