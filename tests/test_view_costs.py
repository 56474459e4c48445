"""What views cost: the table of the page on views."""

import math
from pathlib import Path

import numpy as np
import pytest
from panorama_vlm.benchmarks.view_costs import cell_sides, cost, cost_table
from panorama_vlm.geometry_panorama import View, ViewOptions

GRID = (16, 16)


def test_the_page_holds_the_table_as_it_is_computed():
    page = (Path(__file__).resolve().parent.parent / "docs/views.md").read_text()
    assert cost_table(GRID) in page


@pytest.mark.parametrize(("overlap", "tiles", "columns"), [(0.5, 8, 6), (0.1, 5, 12)])
def test_fewer_tiles_own_the_expensive_borders(overlap, tiles, columns):
    """By the formula: a tile owns the columns whose middle is within half a stride of its centre."""
    half = math.tan(math.radians(180 / tiles))
    middles = [abs(2 * (j + 0.5) / 16 - 1) for j in range(16)]
    assert sum(middle < half for middle in middles) == columns
    assert cost(ViewOptions("e2p", 90.0, overlap), GRID).tokens == 16 * columns * tiles


@pytest.mark.parametrize(("side", "columns"), [(16, 6), (24, 10)])
def test_what_no_token_shows_lies_between_the_last_column_of_a_tile_and_the_first_of_the_next(side, columns):
    """Of eight tiles the owned columns end at the tangent columns/side; half of the way to the next centre is 22.5°."""
    between = max(0.0, 1 - math.degrees(math.atan(columns / side)) / 22.5)
    assert cost(ViewOptions("e2p", 90.0, 0.5), (side, side)).unshown == pytest.approx(between, abs=5e-3)


def test_tiles_that_touch_show_what_they_see_once_and_throw_nothing_away():
    found = cost(ViewOptions("anyres_tiles", 90.0), GRID)
    assert (found.views, found.tokens, found.discarded) == (5, 1280, 0)
    assert found.unshown < 1e-3 and found.repeated < 1e-3
    assert found.seen == pytest.approx(2 / 3, abs=1e-3)  # four of six faces of a cube
    assert found.tower == pytest.approx(5 / 9)


def test_cells_of_a_cubes_faces_make_up_the_sphere():
    sides = cell_sides(View("perspective", fov=90.0), (64, 64))
    assert 6 * np.square(np.radians(sides)).sum() == pytest.approx(4 * math.pi, rel=1e-3)
