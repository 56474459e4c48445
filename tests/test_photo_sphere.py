"""What files say about the part of the sphere that they show. The pictures in `inputs/` encode each pixel's ray as a
colour, so that where it belongs can be computed."""

import math
from pathlib import Path

import numpy as np
import pytest
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.geometry_panorama import View
from panorama_vlm.reading_panorama import read_panorama
from panorama_vlm.sampling_panorama import rotated_pixels
from panorama_vlm.tests.test_reading import crop_values, encoded, photo_sphere
from PIL import Image
from scipy.spatial.transform import Rotation

INPUTS = Path(__file__).parent / "inputs"


def rays_of(pixels):
    """The rays that the colours of pixels [..., 3] name."""
    rays = np.asarray(pixels, float) / 127.5 - 1
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def degrees_off(panorama, inset=0):
    """Mean angle in degrees between where pixels lie and where their colours say, within what the file covers."""
    height, width = panorama.pixels.shape[:2]
    top, bottom, left, right = panorama.covered or (0, 1, 0, 1)
    part = np.s_[
        round(top * height) + inset : round(bottom * height) - inset,
        round(left * width) + inset : round(right * width) - inset,
    ]
    shown, there = rays_of(panorama.pixels.numpy())[part], View("erp").rays((height, width))[part]
    return float(np.degrees(np.arccos(np.clip((shown * there).sum(-1), -1, 1))).mean())


@pytest.mark.parametrize("name", ["ok.jpg", "prefix_ns2.jpg"])
def test_a_crop_lies_where_its_colours_say(name):
    panorama = read_panorama(INPUTS / name)
    assert panorama.covered == (0.25, 0.75, 0.25, 0.75)
    assert degrees_off(panorama) < 0.6


# Pose


def camera_of(pitch, roll):
    """Directions of the image in the level world [3, 3], by scipy, in the axes of three.js (left, up, ahead) and in the
    order of Photo Sphere Viewer since 5.13: `mesh.rotation.set(-tilt, pan, roll, "YXZ")`."""
    left_is_right = np.diag([-1.0, 1.0, 1.0])
    mesh = Rotation.from_euler("YXZ", [0.0, -pitch, roll], degrees=True).as_matrix()
    return left_is_right @ mesh @ left_is_right


def with_pose(image, **pose):
    return encoded(image, "JPEG", quality=95, subsampling=0, xmp=photo_sphere(**pose))


def test_a_tilted_panorama_is_levelled_as_viewers_do():
    """The colours name directions of the image."""
    panorama = read_panorama(INPUTS / "theta_tilted.jpg")
    shown = rays_of(panorama.pixels.numpy())
    in_world = shown @ camera_of(17, -121).T
    apart = np.degrees(np.arccos(np.clip((in_world * View("erp").rays((64, 128))).sum(-1), -1, 1)))
    assert apart.mean() < 0.7  # of 2.8 a pixel
    as_it_is = read_panorama(INPUTS / "theta_tilted.jpg", level=False)
    assert degrees_off(as_it_is) < 0.6


def test_the_horizon_turns_to_the_left_in_the_image_as_roll_rises_and_sinks_as_the_camera_looks_up():
    """Google's words for roll and pitch, on a world of sky and ground: what the level world looks like is known."""
    rays = View("perspective", fov=60.0).rays((65, 65))
    for pitch, roll in ((0, 20), (15, 0), (15, 20), (-30, 140)):
        # In the front view of such a camera, up is (-sin roll, cos roll) in the plane of the image.
        whole = View("erp").rays((256, 512))
        up = np.array([-math.sin(math.radians(roll)), math.cos(math.radians(roll)), 0]) * math.cos(math.radians(pitch))
        up[2] = math.sin(math.radians(pitch))
        picture = Image.fromarray(np.where((whole @ up)[..., None] > 0, 250, 20).astype(np.uint8).repeat(3, -1))
        if (pitch, roll) == (0, 20):  # the right end of the horizon is the higher one: turned to the left
            heights = [int((np.array(picture)[:, column, 0] > 100).sum()) for column in (256 - 64, 256 + 64)]
            assert heights[0] > heights[1]
        processor = PanoramaImageProcessor(image_size=65, view_strategy="e2p", fov_deg=60.0)
        data = with_pose(picture, PosePitchDegrees=pitch, PoseRollDegrees=roll)
        views = processor(data, return_tensors="pt")["pixel_values"][0, :, 0]
        is_sky = np.broadcast_to(rays[..., 1] > 0, views.shape)
        sure = np.abs(rays[..., 1]) > 0.03
        assert ((views.numpy() > 0) == is_sky)[:, sure].all()


@pytest.mark.parametrize("options", [{}, {"yaw_offsets": [70.0]}, {"mirrored": [True], "yaw_offsets": [-25.0]}])
@pytest.mark.parametrize("backend", ["opencv", "torch"])
def test_views_of_a_tilted_panorama_are_those_of_the_level_one(mosaic, psnr, monkeypatch, options, backend):
    """Tilted by the pixels in float, at a resolution where that blurs nothing that the views show."""
    if backend == "torch":
        monkeypatch.setattr("panorama_vlm.sampling_panorama.cv2", None)
    level = mosaic.resize((2048, 1024), Image.Resampling.BOX)
    tilted = Image.fromarray(rotated_pixels(np.array(level), camera_of(17, -121)))
    processor = PanoramaImageProcessor(image_size=64)
    wanted = processor(level, return_tensors="pt", **options)["pixel_values"][0]
    data = with_pose(tilted, PosePitchDegrees=17, PoseRollDegrees=-121)
    found = processor(data, return_tensors="pt", **options)["pixel_values"][0]
    assert min(psnr(a, b, 2) for a, b in zip(found, wanted, strict=True)) > 30
    unlevelled = processor(data, level=False, return_tensors="pt", **options)["pixel_values"][0]
    assert psnr(unlevelled, wanted, 2) < 20
    in_pixels = read_panorama(data, yaw_offset=options.get("yaw_offsets", [0])[0], mirrored="mirrored" in options)
    again = processor(in_pixels.pixels.numpy(), return_tensors="pt")["pixel_values"][0]
    assert min(psnr(a, b, 2) for a, b in zip(again, wanted, strict=True)) > 30


def test_north_comes_to_the_front_of_a_levelled_panorama(mosaic, psnr):
    level = mosaic.resize((1024, 512), Image.Resampling.BOX)
    tilted = Image.fromarray(rotated_pixels(np.array(level), camera_of(-20, 35)))
    data = with_pose(tilted, PosePitchDegrees=-20, PoseRollDegrees=35, PoseHeadingDegrees=90)
    processor = PanoramaImageProcessor(image_size=48)
    wanted = processor(level, yaw_offsets=[-90.0], return_tensors="pt")["pixel_values"][0]
    assert psnr(processor(data, align_heading=True, return_tensors="pt")["pixel_values"][0], wanted, 2) > 28


def test_the_mask_of_a_tilted_partial_panorama_is_turned_along():
    """Brute force: white where the camera saw, black elsewhere."""
    generator = np.random.default_rng(0)
    white = Image.new("RGB", (160, 96), "white")
    processor = PanoramaImageProcessor(
        image_size=64,
        view_strategy="e2p",
        fov_deg=60.0,
        pitch_rows=[-60, 0, 60],
        image_mean=(0, 0, 0),
        image_std=(1, 1, 1),
    )
    masked = 0
    for _ in range(8):
        pitch, roll, yaw = (float(generator.integers(-most, most)) for most in (90, 180, 180))
        crop = crop_values((512, 256), (160, 96), int(generator.integers(0, 160)), int(generator.integers(0, 352)))
        data = with_pose(white, PosePitchDegrees=pitch, PoseRollDegrees=roll, **crop)
        out = processor(data, yaw_offsets=[yaw], mirrored=[roll > 0], return_tensors="pt")
        mask, shown = out["view_mask"][0], out["pixel_values"][0].amax((1, 2, 3))
        assert (mask | (shown < 0.2)).all() and (~mask | (shown > 0)).all()
        masked += int((~mask).sum())
        panorama = read_panorama(data, yaw_offset=yaw, mirrored=roll > 0)
        assert panorama.covered is None and panorama.rotation is None
        assert (panorama.seen == (panorama.pixels[..., 0] > 191)).float().mean() > 0.995
    assert masked > 50
