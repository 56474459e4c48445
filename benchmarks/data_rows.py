"""What do a million conversations cost before training begins? Time to open a LLaVA-style JSONL, and memory a process.

`python -m panorama_vlm.benchmarks.data_rows [--rows 100000 1000000]`: for each number of rows the first opening, which
writes a table on disk, a later one, and, as a peer, the list of objects that LLaVA's own loader keeps. Memory is what
the process alone has: pages of files that all processes share are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_QUESTION = "<image>\nWhat stands behind the observer of picture {}, and about how far away is it?"
_ANSWER = "A long wall of grey stone with a wooden door in it, about twelve metres away. " * 3
_DRAWN = 2000  # samples that are read at random places
WAYS = ("first", "again", "again, a share for validation", "list of objects")


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="rows of the files")
    parser.add_argument("--panoramas", type=int, default=1000, help="panoramas that the rows are about")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    print(f"{'rows':>10} {'MiB':>6}  {'':<30} {'seconds':>8} {'MiB a process':>14} {'µs a sample':>12}")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = write_rows(Path(folder), rows, options.panoramas)
            for way in WAYS:
                found = _in_a_process(way, file, folder)
                size = file.stat().st_size / 2**20
                print(
                    f"{rows:>10} {size:>6.0f}  {way:<30} {found['seconds']:>8.2f} {found['mib']:>14.1f} "
                    f"{found['microseconds']:>12.0f}",
                    flush=True,
                )


def write_rows(folder: Path, rows: int, panoramas: int) -> Path:
    """A LLaVA-style file, and empty files of its panoramas."""
    for number in range(panoramas):
        (folder / f"{number}.jpg").touch()
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(rows):
            turns = [{"from": "human", "value": _QUESTION.format(number)}, {"from": "gpt", "value": _ANSWER}]
            row = {"id": str(number), "image": f"{number % panoramas}.jpg", "conversations": turns}
            lines.write(json.dumps(row) + "\n")
    return file


def _in_a_process(way: str, file: Path, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "panorama_vlm.benchmarks.data_rows", "--measure", way, str(file)]
    environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(way: str, file: str) -> dict[str, float]:
    """Seconds to open a file, MiB that it takes, and microseconds to read a sample, in this process."""
    from ..data.samples import open_data
    from ..data.sources import DataSource

    before, begin = _own_memory(), time.perf_counter()
    samples: Any
    if way == "list of objects":
        with open(file, encoding="utf-8") as lines:
            samples = [json.loads(line) for line in lines]
    else:
        share = 0.1 if "validation" in way else 0.0
        samples, _ = open_data([DataSource(file)], stage="finetune", seed=0, validation_share=share)
        np.random.default_rng(0).permutation(samples.epoch(0, 0))  # as the order of an epoch is made
    seconds = time.perf_counter() - begin
    places = np.random.default_rng(0).integers(0, len(samples), _DRAWN)
    begin = time.perf_counter()
    for place in places:
        samples[int(place)]
    each = (time.perf_counter() - begin) / _DRAWN
    return {"seconds": seconds, "mib": (_own_memory() - before) / 2**20, "microseconds": each * 1e6}


def _own_memory() -> int:
    """Bytes that belong to this process alone."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


if __name__ == "__main__":
    main()
