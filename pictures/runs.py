"""What training and evaluation have left: the learning curves of runs, the accuracy by direction."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.bootstrap import by_panorama, drawn_means, interval
from ..places_panorama import SECTORS
from ..train.card import COLOURS, loss_points, read_history, smooth
from .figure import DARK, new_figure, tidy, told_apart

LOG, PREDICTIONS = "metrics.jsonl", "predictions.jsonl"  # of the trainer, of the evaluation
STYLES = ("solid", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)))  # of lines, beside their colours
HATCHES = ("", "///", "...", "xxx")  # of bars
MARKERS = ("", "o", "s", "^")  # of runs
_FEW = 10  # points, below which each is shown
_STAGES = ("vision", "resampler", "finetune")


def read_run(run: str | Path) -> dict[str, list[dict[str, Any]]]:
    """What a run logged, by stage.

    Args:
        run: folder of the run (`--output` of the trainer), of one stage's log, or a `metrics.jsonl`.

    Raises:
        ValueError: where there is no log, or a line is none.
    """
    path = Path(run)
    files = [path] if path.is_file() else [*sorted(path.glob(f"logs/*/{LOG}")), *path.glob(LOG)]
    if not files:
        what = "holds no log" if path.is_dir() else "is not there"
        raise ValueError(f"{str(run)!r} {what}: name the --output of a run, which has logs/STAGE/{LOG}")
    history: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for stage, entries in read_history(file).items():
            history.setdefault(stage, []).extend(entries)
    if not any(history.values()):
        raise ValueError(f"{str(run)!r} has logged nothing yet ({files[0]})")
    return history


def _series(entries: Iterable[Mapping[str, Any]], wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Steps and finite values [N, 2] of each figure whose name is wanted; figures that are equal throughout are one."""
    names = sorted({name for entry in entries for name in entry if wanted(name)})
    found = {name.removeprefix(_RATE): loss_points(entries, name) for name in names}
    equal: dict[bytes, list[str]] = {}
    for name, points in found.items():
        equal.setdefault(points.tobytes(), []).append(name)
    return {", ".join(same): found[same[0]] for same in equal.values() if len(found[same[0]])}


_RATE = "learning_rate/"
_ROWS_OF_CURVES: dict[str, Callable[[str], bool]] = {
    "loss": lambda name: name in ("loss", "eval_loss"),
    "learning rate": lambda name: name.startswith(_RATE),
    "share": lambda name: "accuracy" in name or name == "retrieval",
}


def draw_curves(runs: Sequence[str | Path]) -> Figure:
    """The learning curves of one or several runs: a column a stage, with loss, learning rates, and the shares that
    were measured on the way (accuracies of token labels, retrieval of matched tokens) where there are any.

    Thin lines are what was logged, thick ones a running mean; a run has a colour and a marker, what is drawn of it a
    line style.

    Raises:
        ValueError: see :func:`read_run`.
    """
    logs = dict(zip(told_apart(runs), map(read_run, runs), strict=True))
    stages = [stage for stage in _STAGES if any(stage in log for log in logs.values())]
    stages += sorted({stage for log in logs.values() for stage in log} - set(_STAGES))
    drawn = {
        (row, stage, run): _series(log.get(stage, ()), wanted)
        for row, wanted in _ROWS_OF_CURVES.items()
        for stage in stages
        for run, log in logs.items()
    }
    rows = [row for row in _ROWS_OF_CURVES if any(series for (own, *_), series in drawn.items() if own == row)]
    figure = new_figure(max(4.2 * len(stages), 5), 2.5 * len(rows) + 0.4)
    panels = figure.subplots(len(rows), len(stages), squeeze=False)
    looks = dict(zip(logs, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    for (row, stage), axes in zip(product(rows, stages), panels.flat, strict=True):
        names = sorted({name for run in logs for name in drawn[row, stage, run]})
        names.sort(key=lambda name: name == "eval_loss")
        styles = dict(zip(names, cycle(STYLES), strict=False))
        for name, run in product(names, logs):
            if (points := drawn[row, stage, run].get(name)) is not None:
                _line(axes, points, *looks[run], styles[name], name != "eval_loss" and row != "learning rate")
        tidy(axes)
        axes.set_title(stage if row == rows[0] else "", fontsize=10)
        axes.set_ylabel(row if stage == stages[0] else "", fontsize=9)
        axes.set_xlabel("step" if row == rows[-1] else "", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if row == "learning rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
            axes.yaxis.get_offset_text().set_fontsize(8)
        if row == "share":
            axes.set_ylim(0, 1)
        if not names:
            axes.axis("off")
        elif len(names) > 1 or row == "share":
            for name in names:
                axes.plot([], [], color="0.2", linestyle=styles[name], label=name)
            axes.legend(frameon=False, fontsize=7, handlelength=3)
    if len(logs) > 1:
        for run, (colour, marker) in looks.items():
            panels[0, 0].plot([], [], color=colour, linewidth=2, marker=marker, markerfacecolor="white", label=run)
        handles = panels[0, 0].lines[-len(logs) :]
        figure.legend(handles, [*logs], loc="outside upper left", ncols=min(len(logs), 4), frameon=False, fontsize=8)
    return figure


def _line(axes: Any, points: np.ndarray, colour: str, marker: str, style: Any, smoothed: bool) -> None:
    steps, values = points.T
    if smoothed and len(steps) >= _FEW:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        values = smooth(values)
    marker = marker or ("." if len(steps) < _FEW else "")
    axes.plot(
        steps,
        values,
        color=colour,
        linestyle=style,
        linewidth=1.6,
        marker=marker,
        markersize=5,
        markerfacecolor="white",
        markevery=max(1, len(steps) // 12),
    )


class Sector(NamedTuple):
    """An eighth of the horizon.

    Attributes:
        name: such as `front-right`.
        questions: how many there are whose answer lies there.
        accuracy: share of them answered right, NaN where there are none.
        interval: of 95 %, by bootstrap over panoramas; `None` where there are none.
    """

    name: str
    questions: int
    accuracy: float
    interval: list[float] | None


def accuracy_by_direction(results: str | Path) -> list[Sector]:
    """How many answers are right by where they lie around the observer.

    Args:
        results: folder of an evaluation (`python -m panorama_vlm.evaluation`), which holds `predictions.jsonl`. Of
            panoramas that were turned the answers about the one as given count.

    Raises:
        ValueError: where there are no predictions, or none says where its answer lies.
    """
    file = Path(results) / PREDICTIONS
    if not file.is_file():
        what = "is no folder" if not Path(results).is_dir() else f"holds no {PREDICTIONS}"
        raise ValueError(f"{str(results)!r} {what}: name the output of python -m panorama_vlm.evaluation")
    judged = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    known = [
        each
        for each in judged
        if str(each.get("variant", "0")) == "0" and each.get("yaw") is not None and each.get("right") is not None
    ]
    if not known:
        raise ValueError(f"none of the {len(judged)} answers in {str(file)!r} says in which direction it lies")
    sectors = [SECTORS[round(each["yaw"] / 45) % 8] for each in known]
    right, panoramas = [float(each["right"]) for each in known], [each["panorama"] for each in known]
    sums, counts, names = by_panorama(right, panoramas, sectors)
    drawn = drawn_means(sums, counts)
    own = {
        name: Sector(name, int(counts[:, i].sum()), float(sums[:, i].sum() / counts[:, i].sum()), interval(drawn[:, i]))
        for i, name in enumerate(names)
    }
    return [own.get(name, Sector(name, 0, float("nan"), None)) for name in SECTORS]


def draw_directions(results: Sequence[str | Path]) -> Figure:
    """Accuracy by direction around the observer, seen from above, with 95 % intervals; of one or several evaluations.

    Raises:
        ValueError: see :func:`accuracy_by_direction`.
    """
    found = dict(zip(told_apart(results), map(accuracy_by_direction, results), strict=True))
    figure = new_figure(5.6, 5.4 + 0.25 * (len(found) > 1))
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    width = np.radians(40) / len(found)
    for place, (name, sectors) in enumerate(found.items()):
        known = [(index, each) for index, each in enumerate(sectors) if each.interval is not None]
        turn = (place - (len(found) - 1) / 2) * width
        angles = np.array([np.radians(45 * index) + turn for index, _ in known])
        shares = np.array([100 * each.accuracy for _, each in known])
        edges = 100 * np.array([each.interval for _, each in known])
        look = {"color": COLOURS[place % len(COLOURS)], "edgecolor": "white", "hatch": HATCHES[place % len(HATCHES)]}
        axes.bar(angles, shares, width=width * 0.92, alpha=0.85, label=name, **look)
        axes.vlines(angles, edges[:, 0], edges[:, 1], color=DARK, linewidth=1.4)
    counts = [[each[index].questions for each in found.values()] for index in range(8)]
    labels = [
        f"{name}\n{'of ' + str(own[0]) if len(set(own)) == 1 else 'of ' + ' / '.join(map(str, own))}"
        for name, own in zip(SECTORS, counts, strict=True)
    ]
    axes.set_xticks(np.radians(45 * np.arange(8)), labels, fontsize=8)
    axes.tick_params(axis="x", pad=8)
    axes.set_ylim(0, 100)
    axes.set_yticks([25, 50, 75, 100], ["25", "50", "75", "100 %"], fontsize=7)
    axes.set_rlabel_position(22.5)
    axes.grid(alpha=0.35, linewidth=0.6)
    words = "right answers by direction, seen from above; lines: 95 % intervals"
    axes.set_title(words, fontsize=9, loc="left", x=-0.15, pad=24)
    if len(found) > 1:
        figure.legend(loc="outside upper left", ncols=min(len(found), 3), frameon=False, fontsize=8)
    return figure
