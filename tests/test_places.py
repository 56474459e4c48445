"""Places on the sphere, against counting cells of a fine one."""

import math

import numpy as np
import pytest
from panorama_vlm.geometry_panorama import View
from panorama_vlm.places_panorama import (
    BFoV,
    NamedPlace,
    bfov_iou,
    bfov_of_mask,
    bfov_of_rays,
    check_bfov,
    draw_bfov,
    great_circle,
    in_bfov,
    read_places,
    write_places,
)
from PIL import Image

COLUMNS, ROWS = 14400, 7200
YAW = (np.arange(COLUMNS) + 0.5) / COLUMNS * 360 - 180
PITCH = np.degrees(np.arcsin((np.arange(ROWS) + 0.5) / ROWS * 2 - 1))  # rows of equal area


def counted(first, second):
    """IoU by counting cells of equal area; a place is all cells of some columns and some rows."""

    def masks(place):
        turn = (YAW - place[0] + 180) % 360 - 180
        return np.abs(turn) <= place[2] / 2, np.abs(PITCH - place[1]) <= place[3] / 2

    (a, b), (c, d) = masks(first), masks(second)
    shared = np.sum(a & c) * np.sum(b & d)
    return shared / (np.sum(a) * np.sum(b) + np.sum(c) * np.sum(d) - shared)


def random_place(random):
    kind = random.integers(4)
    yaw = random.uniform(170, 190) if kind == 0 else random.uniform(-180, 180)
    pitch = random.choice([-1, 1]) * random.uniform(70, 90) if kind == 1 else random.uniform(-90, 90)
    x_fov = random.uniform(180, 360) if kind == 2 else random.uniform(2, 180)
    return check_bfov([yaw, pitch, x_fov, random.uniform(2, 100)])


def test_overlap_is_that_of_counted_cells():
    random = np.random.default_rng(0)
    met = 0
    for _ in range(1000):
        first, second = random_place(random), random_place(random)
        expected = counted(first, second)
        assert bfov_iou(first, second) == pytest.approx(expected, abs=1e-3)
        assert bfov_iou(second, first) == pytest.approx(bfov_iou(first, second))
        met += expected > 0
    assert met > 200
    place = BFoV(179, 10, 30, 20)
    assert bfov_iou(place, place) == 1 and bfov_iou(place, place.turned(360)) == pytest.approx(1)
    assert bfov_iou(BFoV(0, 0, 300, 20), BFoV(180, 0, 300, 20)) == pytest.approx(240 / 360)  # they meet on both sides


def test_areas_add_up_to_the_sphere():
    assert BFoV(7, 0, 360, 180).area == pytest.approx(4 * math.pi)
    assert BFoV(7, 90, 360, 60).area == pytest.approx(2 * math.pi * (1 - math.cos(math.radians(30))))


@pytest.mark.parametrize("middle", [0, 179.6, -90])
@pytest.mark.parametrize("pitch", [0, 60, -85])
def test_the_place_of_a_mask_holds_it_and_nothing_smaller_does(middle, pitch):
    height, width = 180, 360
    rays = View("erp").rays((height, width))
    towards = np.array(
        [
            math.cos(math.radians(pitch)) * math.sin(math.radians(middle)),
            math.sin(math.radians(pitch)),
            math.cos(math.radians(pitch)) * math.cos(math.radians(middle)),
        ]
    )
    mask = rays @ towards > math.cos(math.radians(12))
    place = bfov_of_mask(mask)
    rows, columns = np.nonzero(mask)
    assert in_bfov(place, (columns + 0.5) - 180, 90 - (rows + 0.5)).all()
    low, high = place.edges
    assert (high, low) == pytest.approx((90 - rows.min(), 90 - rows.max() - 1))
    used = np.zeros(width, bool)
    used[columns] = True
    # Of all runs of columns that hold every used one, the shortest, by trying every start.
    shortest = min(max((column - start) % width for column in np.flatnonzero(used)) + 1 for start in range(width))
    assert place.x_fov == pytest.approx(shortest, abs=1e-9)
    assert tuple(bfov_of_rays(rays[mask], size=1.0)) == pytest.approx(tuple(place), abs=1e-6)
    assert (place.x_fov == 360) == (abs(pitch) == 85)


def test_nothing_has_no_place():
    assert bfov_of_mask(np.zeros((4, 8), bool)) is None and bfov_of_rays(np.zeros((0, 3))) is None


def test_distances_are_those_of_the_angle_between_rays():
    random = np.random.default_rng(1)
    for _ in range(300):
        a, b = ((random.uniform(-180, 180), random.uniform(-90, 90)) for _ in range(2))
        rays = [
            [math.cos(p) * math.sin(y), math.sin(p), math.cos(p) * math.cos(y)]
            for y, p in (map(math.radians, each) for each in (a, b))
        ]
        assert great_circle(a, b) == pytest.approx(math.degrees(math.acos(np.clip(np.dot(*rays), -1, 1))), abs=1e-5)
    assert great_circle((180, 0), (-180, 0)) == pytest.approx(0, abs=1e-9)
    assert great_circle((0, 0), (180, 0)) == pytest.approx(180)
    assert great_circle((0, 0), (1e-7, 0)) == pytest.approx(1e-7)


def test_turning_and_mirroring():
    place = BFoV(170, 5, 20, 10)
    assert place.turned(90) == BFoV(80, 5, 20, 10) and place.turned(-90).yaw == -100
    assert place.mirrored() == BFoV(-170, 5, 20, 10) and BFoV(-180, 0, 4, 4).mirrored().yaw == -180
    assert BFoV(179.7, -4.4, 0.2, 9.6).rounded() == [-180, -4, 1, 10]


PLACE = BFoV(12, -5, 20, 10)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("[12, -5, 20, 10]", [("", PLACE)]),
        ("(12, -5, 20, 10)", [("", PLACE)]),
        ("12, -5, 20, 10", [("", PLACE)]),
        ("It is at [12°, -5°, 20°, 10°].", [("It", PLACE)]),
        ("The red ball is at [12, −5, 20, 10].", [("The red ball", PLACE)]),
        ("[ 1 2 , - 5 , 2 0 , 1 0 ]", [("", PLACE)]),
        ("[12.0, -5.0, 20, 10.0]", [("", PLACE)]),
        ('{"label": "red ball", "bfov": [12, -5, 20, 10]}', [("red ball", PLACE)]),
        (
            '[{"bfov": [12, -5, 20, 10], "label": "a"}, {"bfov": [-170, 0, 5, 5], "label": "b"}]',
            [("a", PLACE), ("b", BFoV(-170, 0, 5, 5))],
        ),
        ("[[12, -5, 20, 10], [190, 0, 5, 5]]", [("", PLACE), ("", BFoV(-170, 0, 5, 5))]),
        ("yaw=12, pitch=-5, x_fov=20, y_fov=10", [("", PLACE)]),
        ("pitch: -5° yaw: 12° y_fov: 10° x_fov: 20°", [("", PLACE)]),
        ('{"yaw": 12, "pitch": -5, "x_fov": 20, "y_fov": 10}', [("", PLACE)]),
        ("dog: [12, -5, 20, 10]\ncat: [-170, 0, 5, 5]", [("dog", PLACE), ("cat", BFoV(-170, 0, 5, 5))]),
        ("[]", []),
        ("", []),
        ("I see nothing there.", []),
        ("[12, -95, 20, 10]", []),  # beyond the pole
        ("[12, -5, 0, 10]", []),
        ("[12, -5, 20]", []),
        ("[1, 2, 3, 4, 5, 6]", []),
        ("In 2024, 3 dogs and 12 cats", []),
    ],
)
def test_places_are_read_in_the_ways_they_are_written_and_none_is_invented(text, places):
    assert read_places(text) == [NamedPlace(label, place) for label, place in places]


def test_what_is_written_is_read_again():
    random = np.random.default_rng(2)
    for count in (0, 1, 3):
        places = [random_place(random) for _ in range(count)]
        again = [named.place for named in read_places(write_places(places))]
        assert again == [check_bfov(place.rounded()) for place in places]


def test_a_very_long_answer_takes_no_time():
    assert read_places("1, " * 50_000 + "[" * 1000) == []


@pytest.mark.parametrize(
    "values", [[0, 0, 10], [0, 91, 10, 10], [0, 0, 0, 10], [0, 0, 361, 10], [0, float("nan"), 1, 1]]
)
def test_what_is_no_place_is_refused(values):
    with pytest.raises(ValueError, match="degrees, got"):
        check_bfov(values)


def test_a_place_is_drawn_where_it_lies_across_the_seam_too():
    drawn = np.asarray(draw_bfov(Image.new("RGB", (360, 180)), BFoV(-180, 0, 40, 30), "red", width=1))
    red = drawn[..., 0] > 0
    rows, columns = np.nonzero(red)
    assert set(columns.tolist()) == {*range(0, 20), *range(340, 360)}
    assert (rows.min(), rows.max()) == (75, 105)
    assert red[75, [0, 10, 350]].all() and not red[90, [0, 10, 350]].any() and red[90, 19]
