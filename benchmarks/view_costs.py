"""What do views cost, and what do they show? Every kind of plan beside the default one and one squeezed image.

`python -m panorama_vlm.benchmarks.view_costs [--image-size 256 --patch-size 16]`: the table of `docs/views.md`, from
the geometry alone; no model is run.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import numpy as np

from ..geometry_panorama import Grid, View, ViewOptions, owned_tokens, times_shown

_SPHERE = 4 * math.pi * math.degrees(1) ** 2  # square degrees
_DEFAULT = ViewOptions()
_COMPARED = (  # the plans of the table
    ViewOptions("resize"),
    ViewOptions("anyres_e2p", 90.0, 0.5),
    ViewOptions("anyres_e2p", 90.0, 0.25),
    ViewOptions("anyres_e2p", 90.0, 0.1),
    ViewOptions("anyres_e2p", 90.0, 0.5, pole_caps=True),
    ViewOptions("anyres_e2p", 90.0, 0.5, (-45.0, 0.0, 45.0)),
    ViewOptions("anyres_e2p", 60.0, 0.5),
    ViewOptions("anyres_e2p", 120.0, 0.5),
    ViewOptions("anyres_tiles", 120.0),
    ViewOptions("anyres_tiles", 90.0),
    ViewOptions("anyres_tiles", 72.0),
    ViewOptions("anyres_tiles", 60.0),
    ViewOptions("anyres_tiles", 90.0, pole_caps=True),
    ViewOptions("e2p", 90.0, 0.5),
    ViewOptions("tiles", 90.0),
    ViewOptions("cubemap"),
    ViewOptions("sliding_window", 90.0, 0.5),
    ViewOptions("sliding_window", 90.0, 0.1),
)


class Cost(NamedTuple):
    """What a plan costs and shows.

    Args:
        views: how many views the tower encodes.
        tokens: how many tokens reach the language model.
        seen: share of the sphere that tiles see (the global view, where there is no tile).
        degrees: of those tokens of tiles: the square root of what they see together over their number.
        finest, coarsest: the square roots of the cells of the finest and the coarsest of them, in degrees.
        unshown: share of what tiles see that lies in no cell of a token that reaches the language model.
        repeated: share of what tiles see that lies in more than one.
        discarded: share of the encoded tokens that does not reach the language model.
        tower: cost of the tower, in that of the default plan.
        cut: the same, if each tile were cut to the rectangle of tokens that reach the language model.
    """

    views: int
    tokens: int
    seen: float
    degrees: float
    finest: float
    coarsest: float
    unshown: float
    repeated: float
    discarded: float
    tower: float
    cut: float


def cost(options: ViewOptions, grid: Grid) -> Cost:
    """What a plan costs with a grid of (rows, columns) of tokens a view, `token_selection="owned"`.

    Shares of the sphere are counted on 200,000 directions spread evenly over it; the tower costs as much for each token
    that it encodes, which is exact for whole views and, for cut ones, too much by what their attention saves.
    """
    plan = options.plan
    owned = owned_tokens(plan, grid)
    tiles = list(plan.tiles) or [0]
    times = times_shown(plan, grid, 200_000)
    seen = times >= 0
    sides = np.concatenate([cell_sides(plan.views[tile], grid)[owned[tile]] for tile in tiles])
    default = _DEFAULT.plan.num_views * grid[0] * grid[1]
    return Cost(
        views=plan.num_views,
        tokens=int(owned.sum()),
        seen=float(seen.mean()),
        degrees=math.sqrt(seen.mean() * _SPHERE / owned[tiles].sum()),
        finest=sides.min(),
        coarsest=sides.max(),
        unshown=float((times[seen] == 0).mean()),
        repeated=float((times[seen] > 1).mean()),
        discarded=1 - float(owned.mean()),
        tower=owned.size / default,
        cut=sum(_box(tokens.reshape(grid)) for tokens in owned) / default,
    )


def cell_sides(view: View, grid: Grid) -> np.ndarray:
    """The square root of what each cell of a view sees, in degrees, [rows * columns]."""
    row, column = np.indices(grid)
    down = view.rays_at(row + 0.5, column, grid) - view.rays_at(row - 0.5, column, grid)
    right = view.rays_at(row, column + 0.5, grid) - view.rays_at(row, column - 0.5, grid)
    return np.degrees(np.sqrt(np.linalg.norm(np.cross(down, right), axis=-1))).ravel()


def _box(owned: np.ndarray) -> int:
    """How many cells the smallest rectangle around the owned ones has, [rows, columns] of bool."""
    rows, columns = np.nonzero(owned)
    return int(np.ptp(rows) + 1) * int(np.ptp(columns) + 1) if len(rows) else 0


def cost_table(grid: Grid) -> str:
    """The costs of the plans of `docs/views.md` as a table in Markdown."""
    names = ["strategy", "field of view", "overlap", "more", "views", "tokens", "sphere seen", "degrees a token"]
    names += ["in no token", "in two", "tower", "thrown away", "tower, cut"]
    lines = ["| " + " | ".join(names) + " |", "|---|--:|--:|---|" + "--:|" * (len(names) - 4)]
    return "\n".join([*lines, *(_cost_line(options, cost(options, grid)) for options in _COMPARED)])


def _cost_line(options: ViewOptions, found: Cost) -> str:
    """One line of the table."""
    overlaps = options.view_strategy in ("anyres_e2p", "e2p", "sliding_window")
    more = [f"{len(options.pitch_rows)} rows"] * (len(options.pitch_rows) > 1) + ["caps"] * options.pole_caps
    cells = [
        f"`{options.view_strategy}`" + " (default)" * (options == _DEFAULT),
        f"{options.plan.views[-1].fov:g}°",
        f"{options.overlap_ratio:g}" * overlaps,
        ", ".join(more),
        str(found.views),
        f"{found.tokens:,}",
        f"{found.seen:.0%}",
        f"{found.degrees:.1f} ({found.finest:.1f} to {found.coarsest:.1f})",
        f"{found.unshown:.0%}",
        f"{found.repeated:.0%}",
        f"{found.tower:.2f}",
        f"{found.discarded:.0%}",
        f"{found.cut:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.benchmarks.view_costs", description="Print what each kind of plan costs."
    )
    parser.add_argument("--image-size", type=int, default=256, help="side of a view in pixels")
    parser.add_argument("--patch-size", type=int, default=16, help="side of a patch of the vision tower in pixels")
    options = parser.parse_args(arguments)
    side = options.image_size // options.patch_size
    print(cost_table((side, side)))


if __name__ == "__main__":
    main()
