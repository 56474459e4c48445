"""What is 2:1 and no panorama: told by its looks, and laid down where it is said what it is."""

import json
import warnings
from pathlib import Path

import numpy as np
import py360convert
import pytest
import torch
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.data.collators import VisionCollator
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.skipped import SkippedSamples
from panorama_vlm.data.sources import DataSource, open_source
from panorama_vlm.projections_panorama import Projection, looks_like
from panorama_vlm.reading_panorama import read_panorama
from PIL import Image

FILES = Path(__file__).parent / "inputs"
SAMPLES = sorted((Path(__file__).parents[1] / "samples").rglob("*.jpg"))


def rays(height):
    """Unit rays [height, 2 height, 3] of an equirectangular picture, x right, y up, z forward."""
    yaw = ((np.arange(2 * height) + 0.5) / (2 * height) - 0.5) * 2 * np.pi
    pitch = (0.5 - (np.arange(height)[:, None] + 0.5) / height) * np.pi
    return np.stack(np.broadcast_arrays(np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)), -1)


def angles_off(panorama, covered=True):
    """Degrees between the ray that each pixel's colour says and the one it lies at."""
    pixels = panorama.pixels.numpy() / 255.0 * 2 - 1
    pixels /= np.linalg.norm(pixels, axis=-1, keepdims=True)
    off = np.degrees(np.arccos(np.clip((pixels * rays(len(pixels))).sum(-1), -1, 1)))
    if panorama.covered is not None and covered:
        top, bottom, left, right = (
            (np.array(panorama.covered) * np.tile(np.repeat(off.shape, 2), 1)).round().astype(int)
        )
        off = off[top + 1 : bottom - 1, left + 1 : right - 1]
    return off


def coded(directions):
    return Image.fromarray(((directions + 1) / 2 * 255).round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", ["cubemap_3x2", "cubemap_6x1", "cubemap_6x1:faces=frblud"])
def test_cube_faces_come_back_as_the_panorama_of_py360convert(panoramas, name):
    """`dice` is its cross: up above front, left, front, right, back in a row, down below front."""
    panorama = np.array(coded(rays(256)))
    dice = py360convert.e2c(panorama, face_w=160, mode="bilinear", cube_format="dice")
    size = 160
    at = {"u": (0, 1), "l": (1, 0), "f": (1, 1), "r": (1, 2), "b": (1, 3), "d": (2, 1)}
    face = {k: dice[r * size : (r + 1) * size, c * size : (c + 1) * size] for k, (r, c) in at.items()}
    order = Projection.parse(name).faces
    rows = [order[:3], order[3:]] if "3x2" in name else [order]
    picture = np.concatenate([np.concatenate([face[each] for each in row], 1) for row in rows])
    found = read_panorama(picture.astype(np.uint8), projection=name)
    assert found.covered is None and found.pixels.shape == (320, 640, 3)
    assert np.quantile(angles_off(found), 0.999) < 1.2 and angles_off(found).mean() < 0.35


def test_a_dual_fisheye_by_its_formula():
    """Equidistant lenses of 200 degrees: the angle from the axis grows with the radius."""
    size, fov = 300, 200.0
    y, x = ((np.arange(size) + 0.5) / size * 2 - 1 for _ in range(2))
    radius = np.hypot(x[None], y[:, None])
    angle, turn = radius * np.radians(fov / 2), np.arctan2(-y[:, None], x[None])
    front = np.stack([np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), np.cos(angle)], -1)
    back = front * [-1, 1, -1]
    front[radius > 1] = back[radius > 1] = -1
    for name, pair in (("left", (front, back)), ("right", (back, front))):
        for margin in (0, 50):  # of black around each circle, in pixels
            circles = [np.pad(circle, ((margin, margin), (margin, margin), (0, 0))) for circle in pair]
            radius = size / (size + 2 * margin)
            projection = f"dual_fisheye:fov={fov},front={name},radius={radius}"
            found = read_panorama(coded(np.concatenate(circles, 1)), projection=projection)
            assert np.quantile(angles_off(found), 0.999) < 1.2 and angles_off(found).mean() < 0.4


def test_a_cylinder_by_its_formula():
    width, height = 720, 300
    yaw = ((np.arange(width) + 0.5) / width - 0.5) * 2 * np.pi
    up = (height / 2 - (np.arange(height)[:, None] + 0.5)) * 2 * np.pi / width
    directions = np.stack(np.broadcast_arrays(np.sin(yaw), up, np.cos(yaw)), -1)
    found = read_panorama(
        coded(directions / np.linalg.norm(directions, axis=-1, keepdims=True)), projection="cylindrical"
    )
    half = np.degrees(np.arctan(np.pi * height / width)) / 180
    assert found.covered == pytest.approx((0.5 - half, 0.5 + half, 0, 1), abs=0.5 / 360)  # to half a row
    assert angles_off(found).max() < 1.2


@pytest.mark.parametrize(
    ("name", "projection"),
    [("stereo_sbs_half.png", "stereo_side_by_side"), ("vr180_sbs.png", "vr180")],
)
def test_stereo_files_of_the_report_are_laid_down(name, projection):
    found = read_panorama(FILES / name, projection=projection)
    off = angles_off(found)
    assert np.quantile(off, 0.99) < 2.5 and off.mean() < 1
    assert (found.covered == (0, 1, 0.25, 0.75)) == (projection == "vr180")


@pytest.mark.parametrize(("name", "axis"), [("stereo_top_bottom", 0), ("stereo_side_by_side", 1), ("vr180", 1)])
def test_of_two_eyes_the_left_or_upper_one_is_shown(name, axis):
    eye = np.array(coded(rays(128)[:, 64:192] if name == "vr180" else rays(128)))
    found = read_panorama(np.concatenate([eye, 0 * eye], axis), projection=name)
    assert angles_off(found).max() < 1.5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dualfisheye.png", ".*fisheye circles.*dual_fisheye:fov="),
        ("stereo_sbs_half.png", "two pictures side by side.*stereo_side_by_side"),
        ("vr180_sbs.png", "two pictures side by side.*vr180"),
    ],
)
def test_what_looks_like_something_else_is_warned_of_and_refused_where_that_is_asked_for(name, words):
    with pytest.warns(UserWarning, match=rf"{name} looks like {words}"):
        read_panorama(FILES / name)
    with pytest.raises(ValueError, match=rf"{name} looks like {words}"):
        PanoramaImageProcessor(image_size=16, strict_aspect=True)(FILES / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PanoramaImageProcessor(image_size=16, strict_aspect=True, projection="equirectangular")(FILES / name)


def test_fisheye_circles_on_black_are_told_by_their_corners(panoramas):
    picture = np.array(panoramas[0])
    y, x = (np.arange(256)[:, None] + 0.5) / 128 - 1, (np.arange(512) + 0.5) / 128
    picture[np.hypot(np.where(x < 2, x - 1, x - 3), y) > 1] = 2
    with pytest.warns(UserWarning, match="two fisheye circles: projection='dual_fisheye:fov="):
        read_panorama(picture)


@pytest.mark.parametrize(
    ("size", "words"), [((300, 200), "cubemap_3x2"), ((600, 100), "cubemap_6x1"), ((90, 90), "faces")]
)
def test_what_the_sides_of_a_cube_map_may_be_is_said(size, words):
    with pytest.warns(UserWarning, match=rf"not 2:1.*{words}.*taken as the middle"):
        read_panorama(Image.new("RGB", size))


def test_a_photograph_of_two_to_one_is_warned_of():
    y, x = np.mgrid[0:1:256j, 0:1:512j]
    photograph = Image.fromarray((255 * np.stack([x * (0.5 + 0.5 * y), x, x * y], -1)).astype(np.uint8))
    with pytest.warns(UserWarning, match="looks like a photograph"):
        read_panorama(photograph)


def test_no_panorama_at_hand_is_taken_for_something_else(panoramas, mosaic):
    assert SAMPLES
    for image in [*panoramas, *map(Image.open, SAMPLES)]:
        for turn in (0, 90):
            pixels = torch.tensor(np.roll(np.array(image.convert("RGB")), turn * image.width // 360, 1))
            assert abs(image.width / image.height - 2) > 0.02 or looks_like(pixels) is None


def test_a_source_says_what_its_files_are_and_strict_runs_count_what_they_are_not(tmp_path, make):
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "a.png"}) + "\n")
    (tmp_path / "a.png").write_bytes((FILES / "vr180_sbs.png").read_bytes())
    _, processor = make()
    processor.image_processor.strict_aspect = True
    batches = {}
    for projection in (None, "vr180"):
        source = DataSource(str(tmp_path / "t.jsonl"), projection=projection)
        samples, _ = open_data([source], stage="vision", seed=0)
        skipped = []
        batches[projection] = VisionCollator(processor, 0, random_heading=False)([samples[0]], skipped)
        if projection is None:
            listed = SkippedSamples(tmp_path / "skipped.jsonl")
            listed.add([{**record, "step": 1} for record in skipped], 1)
            assert "a.png looks like two pictures side by side" in (tmp_path / "skipped.jsonl").read_text()
    assert batches[None] is None and not skipped
    given = {"path": str(tmp_path / "a.png"), "projection": "vr180"}
    expected = processor.image_processor(given, return_tensors="pt")
    assert torch.equal(batches["vr180"]["pixel_values"], expected["pixel_values"])
    assert torch.equal(batches["vr180"]["view_mask"], expected["view_mask"])
    cached = [
        processor.image_processor(image, cache_dir=str(tmp_path / "c"), strict_aspect=False, return_tensors="pt")
        for image in (str(tmp_path / "a.png"), given)
    ]
    assert "view_mask" not in cached[0] and "view_mask" in cached[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fisheye", "projection must be one of equirectangular"),
        ("cylindrical:fov=3", "has the options"),
        ("dual_fisheye", "needs the field of view of its lenses"),
        ("dual_fisheye:fov=x", "must be a number, got 'x'"),
        ("cubemap_3x2:faces=rrrrrr", "each of r, l, u, d, f, b once"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text, words):
    with pytest.raises(ValueError, match=words):
        PanoramaImageProcessor(projection=text)
    with pytest.raises(ValueError, match=words):
        open_source(DataSource("x.jsonl", projection=text), "vision")
    with pytest.raises(ValueError, match=r"cannot read .*a cubemap_3x2 is 1.5:1, and it has 512 x 256"):
        read_panorama(Image.new("RGB", (512, 256)), projection="cubemap_3x2")
