"""Intervals by the bootstrap over panoramas: questions of one are not independent, so they are drawn together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS, SEED, LEVEL = 1000, 0, 0.95
_CELLS = 4_000_000  # of a block of draws x panoramas


def by_panorama(
    values: Sequence[float], panoramas: Sequence[str], columns: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sums and counts of values, each [panoramas, columns], and the names of the columns, both sorted by name."""
    rows = {name: index for index, name in enumerate(sorted(set(panoramas)))}
    names = sorted(set(columns))
    places = {name: index for index, name in enumerate(names)}
    sums, counts = (np.zeros((len(rows), len(names))) for _ in range(2))
    at = ([rows[name] for name in panoramas], [places[name] for name in columns])
    np.add.at(sums, at, np.asarray(values, dtype=np.float64))
    np.add.at(counts, at, 1.0)
    return sums, counts, names


def drawn_means(sums: np.ndarray, counts: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Means [draws, columns] over as many panoramas as there are, drawn with replacement; NaN where a draw holds none
    of a column. The same panoramas are drawn for every column, and for everything with as many panoramas."""
    total = len(sums)
    random = np.random.default_rng(seed)
    block = max(1, _CELLS // max(1, total))
    means = []
    for first in range(0, draws, block):
        size = min(block, draws - first)
        drawn = random.integers(total, size=(size, total)) + total * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * total).reshape(size, total).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((times @ sums) / (times @ counts))
    return np.concatenate(means)


def interval(drawn: np.ndarray) -> list[float] | None:
    """The middle 95 % of draws [draws], NaNs left out; `None` where nothing was drawn."""
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0:
        return None
    return [float(edge) for edge in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def mean_over_columns(means: np.ndarray) -> np.ndarray:
    """[draws, columns] -> [draws]: the mean over the columns of which a draw holds any."""
    known = np.isfinite(means)
    return np.where(known, means, 0.0).sum(1) / np.maximum(known.sum(1), 1)
