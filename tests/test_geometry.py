import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from panorama_vlm.geometry_panorama import (
    View,
    ViewOptions,
    ViewPlan,
    loop_yaws,
    owned_tokens,
    plan_rays,
    ray_angles,
    ray_code,
    ray_correspondences,
    strip_correspondences,
)
from panorama_vlm.image_processing_panorama import PanoramaImageProcessor

ROWS_OF_PITCH = [(0.0,), (-45.0, 0.0, 45.0)]


def directions(count=40_000):
    """Unit rays [count, 3] spread evenly over the sphere, along a spiral from pole to pole (Fibonacci)."""
    index = np.arange(count) + 0.5
    height, turn = 1 - 2 * index / count, index * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.sin(turn), height, radius * np.cos(turn)], -1)


def token_at(view: View, rays, grid):
    """The token of a tile whose cell a ray falls into, and whether the tile sees it, from the convention written out:
    turn the world left by the yaw, then down by the pitch, and divide by the depth."""
    a, b, half = math.radians(view.yaw), math.radians(view.pitch), math.tan(math.radians(view.fov) / 2)
    x = rays[..., 0] * math.cos(a) - rays[..., 2] * math.sin(a)
    z = rays[..., 0] * math.sin(a) + rays[..., 2] * math.cos(a)
    y, z = rays[..., 1] * math.cos(b) - z * math.sin(b), rays[..., 1] * math.sin(b) + z * math.cos(b)
    x, y = x / np.where(z > 0, z, 1) / half, y / np.where(z > 0, z, 1) / half
    sees = (z > 0) & (np.abs(x) <= 1 + 1e-9) & (np.abs(y) <= 1 + 1e-9)
    column, row = ((1 + x) / 2 * grid[1]).astype(int), ((1 - y) / 2 * grid[0]).astype(int)
    return np.clip(row, 0, grid[0] - 1) * grid[1] + np.clip(column, 0, grid[1] - 1), sees


def angle(a, b):
    """Degrees between rays, exact for small angles too."""
    return np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)))


def rays_at(view: View, row, column, grid):
    """Rays of fractional places of a tile or of the global view, from the convention written out."""
    if view.is_global:
        yaw = np.radians(((column + 0.5) / grid[1] - 0.5) * 360)
        pitch = np.radians((0.5 - (row + 0.5) / grid[0]) * 180)
        return np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], -1)
    half = math.tan(math.radians(view.fov) / 2)
    x = (2 * (column + 0.5) / grid[1] - 1) * half
    y = (1 - 2 * (row + 0.5) / grid[0]) * half
    a, b = math.radians(view.yaw), math.radians(view.pitch)
    length = np.sqrt(x * x + y * y + 1)
    # pitch up by b, then yaw right by a
    y, z = (y * math.cos(b) + math.sin(b)) / length, (-y * math.sin(b) + math.cos(b)) / length
    x = x / length
    return np.stack([x * math.cos(a) + z * math.sin(a), y, -x * math.sin(a) + z * math.cos(a)], -1)


def test_ninety_degrees_with_half_overlap_is_a_loop_of_eight_tiles_that_starts_at_the_front_and_turns_right():
    assert loop_yaws(90, 0.5) == [0, 45, 90, 135, 180, 225, 270, 315]


@pytest.mark.parametrize(("fov", "overlap"), list(itertools.product([60, 65, 90, 110], [0.2, 0.3, 0.5, 0.7])))
def test_a_loop_closes_with_at_least_the_overlap_that_was_asked_for(fov, overlap):
    tiles = loop_yaws(fov, overlap)
    assert 360 / len(tiles) <= fov * (1 - overlap) + 1e-9
    assert 360 / (len(tiles) - 1) > fov * (1 - overlap) - 1e-9


def test_the_global_view_comes_first_then_row_by_row_of_pitch():
    plan = ViewOptions("anyres_e2p", 90.0, 0.5, (-30.0, 30.0)).plan
    assert plan.views[0].kind == "erp"
    assert [view.pitch for view in plan.views[1:]] == [-30.0] * 8 + [30.0] * 8


def test_erp_rays_follow_the_convention():
    height, width = 8, 16
    rays = View("erp").rays((height, width))
    for row, column in [(0, 0), (3, 7), (4, 8), (7, 15)]:
        yaw = math.radians(((column + 0.5) / width - 0.5) * 360)
        pitch = math.radians((0.5 - (row + 0.5) / height) * 180)
        expected = [math.cos(pitch) * math.sin(yaw), math.sin(pitch), math.cos(pitch) * math.cos(yaw)]
        np.testing.assert_allclose(rays[row, column], expected, atol=1e-15)


@pytest.mark.parametrize("view", [View("perspective", 0, 0, 90), View("perspective", 200, 35, 65, 1)])
def test_tile_rays_follow_the_convention(view):
    grid = (6, 9)
    row, column = np.meshgrid(np.arange(6.0), np.arange(9.0), indexing="ij")
    np.testing.assert_allclose(view.rays(grid), rays_at(view, row, column, grid), atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(view.rays(grid), axis=-1), 1, atol=1e-14)


def test_the_middle_of_a_tile_looks_where_the_tile_looks():
    yaw, pitch = ray_angles(View("perspective", 70, -20, 90).rays((3, 3))[1, 1])
    assert (yaw, pitch) == (pytest.approx(70), pytest.approx(-20))


@pytest.mark.parametrize("view", [View("erp"), View("perspective", 130, 20, 80)])
def test_cells_is_the_inverse_of_rays(view):
    grid = (5, 8)
    row, column, inside = view.cells(view.rays(grid), grid)
    expected = np.meshgrid(np.arange(5), np.arange(8), indexing="ij")
    np.testing.assert_allclose(row, expected[0], atol=1e-12)
    np.testing.assert_allclose(column, expected[1], atol=1e-12)
    assert inside.all()


def test_what_is_behind_a_tile_is_not_in_it():
    front, back = View("perspective", 0, 0, 90), View("perspective", 180, 0, 90)
    assert not front.cells(back.rays((4, 4)), (4, 4))[2].any()


def test_of_eight_tiles_of_16_by_16_tokens_768_are_owned_and_the_global_view_keeps_all():
    owned = owned_tokens(ViewOptions("anyres_e2p", 90.0, 0.5).plan, (16, 16))
    assert owned[0].all()
    assert owned[1:].sum() == 768


@pytest.mark.parametrize(
    "options",
    [
        *(ViewOptions("anyres_e2p", 65.0, 0.4, rows) for rows in ROWS_OF_PITCH),
        ViewOptions("e2p", 80.0, 0.3, pole_caps=True),  # the caps see directions nearer to a tile that does not
        ViewOptions("anyres_tiles", 80.0, pitch_rows=(-30.0, 30.0), pole_caps=True),
    ],
)
def test_a_token_is_owned_by_the_tile_whose_centre_is_nearest_of_those_that_see_it(options):
    plan, grid = options.plan, (5, 7)
    owned = owned_tokens(plan, grid)
    rays = plan_rays(plan, grid)
    for view in plan.tiles:
        for token in range(grid[0] * grid[1]):
            sees = [other for other in plan.tiles if token_at(plan.views[other], rays[view, token], grid)[1]]
            distances = [angle(rays_at(plan.views[other], 2.0, 3.0, grid), rays[view, token]) for other in sees]
            nearest = sees[int(np.argmin(distances))]
            tied = np.isclose(distances, min(distances), atol=1e-6).sum() > 1
            assert tied or owned[view, token] == (nearest == view)


@pytest.mark.parametrize("strategy", ["e2p", "tiles"])
def test_a_token_that_no_other_tile_sees_is_not_lost_to_one_whose_centre_is_nearer(strategy):
    plan, grid = ViewOptions(strategy, 80.0, 0.3, pole_caps=True).plan, (16, 16)
    rays, owned = plan_rays(plan, grid), owned_tokens(plan, grid)
    alone = sum(token_at(view, rays, grid)[1].astype(int) for view in plan.views) == 1
    centres = np.stack([view.rays((1, 1))[0, 0] for view in plan.views])
    assert (alone & ((rays @ centres.T).argmax(-1) != np.arange(plan.num_views)[:, None])).any()
    assert owned[alone].all()


@pytest.mark.parametrize(
    ("fov", "count"), [(60, 6), (65, 6), (72, 5), (90, 4), (119, 4), (120, 3), (170, 3), (180 - 1e-12, 3)]
)
def test_tiles_that_touch_are_as_few_as_the_field_of_view_allows_and_never_fewer_than_three(fov, count):
    plan = ViewOptions("tiles", float(fov)).plan
    assert [view.yaw for view in plan.views] == [pytest.approx(i * 360 / count) for i in range(count)]
    assert {(view.kind, view.pitch, view.fov) for view in plan.views} == {("perspective", 0.0, 360 / count)}


def test_anyres_tiles_are_the_global_view_and_the_tiles():
    options = {"fov_deg": 90.0, "pitch_rows": (-45.0, 45.0), "pole_caps": True}
    whole, *tiles = ViewOptions("anyres_tiles", **options).plan.views
    assert whole.is_global
    assert tuple(tiles) == ViewOptions("tiles", **options).plan.views
    assert [(view.yaw, view.pitch) for view in tiles[:5]] == [(0, -45), (90, -45), (180, -45), (270, -45), (0, 45)]


def test_an_overlap_means_nothing_to_tiles_that_touch_and_none_at_all_is_still_refused():
    assert ViewOptions("tiles", 90.0, 0.1).plan == ViewOptions("tiles", 90.0, 0.7).plan
    with pytest.raises(ValueError, match=r"^overlap_ratio must be in \(0, 1\), got 0. Typical range: \[0.3, 0.7\]$"):
        ViewOptions("tiles", 90.0, 0)


def test_four_tiles_with_caps_are_the_faces_of_a_cube():
    caps = ViewOptions("tiles", 90.0, pole_caps=True).plan
    np.testing.assert_allclose(plan_rays(caps, (6, 6)), plan_rays(ViewOptions("cubemap").plan, (6, 6)), atol=1e-15)


@pytest.mark.parametrize("fov", [60.0, 72.0, 90.0, 120.0])
@pytest.mark.parametrize("strategy", ["tiles", "anyres_tiles"])
def test_every_direction_that_tiles_which_touch_see_is_in_one_owned_token_and_no_token_is_thrown_away(strategy, fov):
    plan, grid, rays = ViewOptions(strategy, fov).plan, (16, 16), directions()
    owned = owned_tokens(plan, grid)
    assert owned.all()
    times = np.zeros(len(rays), int)
    for tile in plan.tiles:
        token, sees = token_at(plan.views[tile], rays, grid)
        times += sees & owned[tile][token]
    assert set(times) == {0, 1}
    yaw, pitch = ray_angles(rays)
    from_middle = (yaw + 180 / len(plan.tiles)) % (360 / len(plan.tiles)) - 180 / len(plan.tiles)
    highest = np.degrees(np.arctan(np.tan(np.radians(plan.views[-1].fov / 2)) * np.cos(np.radians(from_middle))))
    np.testing.assert_array_equal(times == 1, np.abs(pitch) <= highest)


@pytest.mark.parametrize("fov", [60.0, 72.0, 90.0, 120.0])
@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (3, 5)])
def test_no_token_of_tiles_that_touch_is_seen_by_a_neighbour_but_each_is_by_the_global_view(fov, grid):
    assert len(ViewOptions("tiles", fov).plan.neighbours()) == 360 / fov
    assert ray_correspondences(ViewOptions("tiles", fov).plan, grid) == ()
    plan = ViewOptions("anyres_tiles", fov).plan
    assert ray_correspondences(plan, grid) == ()
    (pairs,) = ray_correspondences(plan, grid, ("neighbours", "global"))
    assert list(pairs.first) == list(plan.tiles) and pairs.tokens.shape[1] == grid[0] * grid[1]


def test_the_pixels_of_tiles_that_touch_look_where_their_rays_say():
    erp = np.round(127.5 + 127.5 * View("erp").rays((512, 1024))).astype(np.uint8)
    processor = PanoramaImageProcessor(
        image_size=64, view_strategy="anyres_tiles", fov_deg=90.0, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    views = processor(erp, return_tensors="pt")["pixel_values"][0]
    assert views.shape == (5, 3, 64, 64)
    for index in processor.view_plan.tiles:
        rays = torch.from_numpy(processor.view_plan.views[index].rays((64, 64))).permute(2, 0, 1)
        assert (views[index] - rays).abs().max() < 0.02


def test_tokens_of_two_tiles_and_the_global_view_that_look_the_same_way_get_the_same_code():
    plan = ViewPlan((View("erp"), View("perspective", 170, 0, 90), View("perspective", 190, 0, 90)))
    ray = np.array([0.0, 0.0, -1.0])  # straight behind: on the seam of the ERP, inside both tiles
    codes = []
    for view in plan.views:
        row, column, _ = view.cells(ray, (16, 32))
        if view.kind == "erp":
            assert column % 32 == pytest.approx(31.5)
            codes.append(ray_code(ray, 6))
        else:
            codes.append(ray_code(rays_at(view, row, column, (16, 32)), 6))
    for code in codes[1:]:
        np.testing.assert_allclose(code, codes[0], atol=1e-12)
    left, right = ray_code(View("erp").rays((16, 3600))[8, [0, -1]], 6)  # 0.1 degrees apart, across the seam
    assert np.abs(left - right).max() < 2 * np.sin(math.radians(0.1) * 2**5 * math.pi / 2) * 1.01


@pytest.mark.parametrize("rows", ROWS_OF_PITCH)
@pytest.mark.parametrize(("fov", "overlap"), list(itertools.product([60, 65, 90, 110], [0.2, 0.45, 0.7])))
def test_matched_tokens_look_the_same_way(fov, overlap, rows):
    grid = (16, 16)
    plan = ViewOptions("anyres_e2p", float(fov), overlap, rows).plan
    groups = ray_correspondences(plan, grid, ("neighbours", "global"))
    assert groups
    rays = plan_rays(plan, grid)
    corner_rows, corner_columns = np.divmod(np.arange(256), 16)
    for pairs in groups:
        np.testing.assert_allclose(pairs.weights.sum(-1), 1, atol=1e-12)
        assert pairs.weights.min() >= -1e-12
        for p in range(len(pairs.first)):
            second = plan.views[pairs.second[p]]
            first_rays = rays[pairs.first[p], pairs.tokens[p]]
            row = (corner_rows[pairs.corners[p]] * pairs.weights[p]).sum(-1)
            columns = corner_columns[pairs.corners[p]]  # [L, 4]
            if second.is_global:  # columns wrap: right of column 15 comes column 0, which is then column 16
                columns = columns[:, :1] + (columns - columns[:, :1]) % 16
            column = (columns * pairs.weights[p]).sum(-1)
            assert angle(rays_at(second, row, column, grid), first_rays).max() < 1e-3


def test_strips_of_perspective_tiles_do_not_look_the_same_way():
    """The figures of the known systems: 6.65 degrees apart on average at 90 degrees and 50 %, 8.83 at most."""
    plan, grid = ViewOptions("anyres_e2p", 90.0, 0.5).plan, (16, 16)
    strips = strip_correspondences(plan.tiles, grid, 0.5)
    rays = plan_rays(plan, grid)
    apart = angle(rays[strips.first[0], strips.tokens[0]], rays[strips.second[0], strips.corners[0, :, 0]])
    print(f"strips: {apart.mean():.2f} degrees apart on average, {apart.max():.2f} at most")
    assert apart.mean() == pytest.approx(6.65, abs=0.01)
    assert apart.max() == pytest.approx(8.83, abs=0.01)


@pytest.mark.parametrize("grid", [(16, 16), (4, 4), (6, 10)])
@pytest.mark.parametrize("kind", ["neighbours", "global"])
def test_interpolated_features_equal_grid_sample_at_the_rays(grid, kind):
    plan = ViewOptions("anyres_e2p", 90.0, 0.5, (-20.0, 20.0)).plan
    features = torch.randn(plan.num_views, 5, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rays = plan_rays(plan, grid)
    for pairs in ray_correspondences(plan, grid, (kind,)):
        for p in range(len(pairs.first)):
            flat = features[pairs.second[p]].flatten(1)  # [5, S]
            ours = (flat[:, torch.tensor(pairs.corners[p])] * torch.tensor(pairs.weights[p])).sum(-1)
            row, column, _ = plan.views[pairs.second[p]].cells(rays[pairs.first[p], pairs.tokens[p]], grid)
            view = features[pairs.second[p]]
            if kind == "global":
                view = torch.cat([view[..., -1:], view, view[..., :1]], -1)
                column = column + 1
            height, width = view.shape[-2:]
            place = np.stack([2 * column / (width - 1) - 1, 2 * row / (height - 1) - 1], -1)
            theirs = F.grid_sample(view[None], torch.tensor(place)[None, None], align_corners=True)[0, :, 0]
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_neighbours_close_the_loop_and_join_rows_of_pitch():
    plan = ViewOptions("anyres_e2p", 90.0, 0.5, (-45.0, 0.0)).plan
    pairs = {frozenset(pair) for pair in plan.neighbours()}
    assert len(plan.neighbours()) == len(pairs) == 24
    assert {8, 1} in pairs and {16, 9} in pairs and {1, 9} in pairs


def test_two_tiles_are_one_pair_and_a_single_view_is_none():
    assert len(ViewPlan(tuple(View("perspective", yaw, 0, 175) for yaw in (0, 180))).neighbours()) == 1
    assert ViewOptions("resize", 90.0, 0.5).plan.neighbours() == ()
    assert not ViewOptions("resize", 90.0, 0.5).plan.has_rays


def test_an_overlap_without_a_common_token_gives_no_pairs():
    plan = ViewOptions("anyres_e2p", 90.0, 0.01).plan
    assert ray_correspondences(plan, (2, 2)) == ()


def test_results_are_cached_and_read_only():
    plan = ViewOptions("anyres_e2p", 90.0, 0.5).plan
    assert plan_rays(plan, (4, 4)) is plan_rays(plan, (4, 4))
    with pytest.raises(ValueError, match="read-only"):
        plan_rays(plan, (4, 4))[0] = 0


def test_pole_caps_look_straight_up_and_down_and_join_all_tiles_of_the_nearest_row():
    plan = ViewOptions("e2p", 90.0, 0.5, (-30.0, 30.0), True).plan
    assert [(view.pitch, view.yaw) for view in plan.views[-2:]] == [(90.0, 0.0), (-90.0, 0.0)]
    partners = {index: set() for index in (16, 17)}
    for pair in plan.neighbours():
        for cap in partners:
            if cap in pair:
                partners[cap] |= set(pair) - {cap}
    assert partners == {16: set(range(8, 16)), 17: set(range(8))}
    assert len(ray_correspondences(plan, (16, 16))) > 1


def test_the_faces_of_a_cube_share_the_sphere_and_do_not_overlap():
    plan = ViewOptions("cubemap", 70.0, 0.3).plan
    looks = {tuple(np.round(view.rays((1, 1))[0, 0]).astype(int)) for view in plan.views}
    assert looks == {(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)}
    assert owned_tokens(plan, (8, 8)).all()
    assert ray_correspondences(plan, (8, 8)) == ()


def test_windows_slid_over_the_erp_image_overlap_in_whole_strips_so_that_rays_and_strips_are_the_same_pairs():
    plan, grid = ViewOptions("sliding_window", 90.0, 0.5).plan, (6, 8)
    assert plan.num_views == 8
    (by_rays,) = ray_correspondences(plan, grid)
    strips = strip_correspondences(plan.tiles, grid, 0.5)
    np.testing.assert_array_equal(by_rays.tokens, strips.tokens)
    np.testing.assert_array_equal(by_rays.nearest, strips.nearest)
    np.testing.assert_allclose(by_rays.weights.max(-1), 1, atol=1e-9)
    assert owned_tokens(plan, grid).sum() == 8 * 6 * 4  # each of 32 columns once
