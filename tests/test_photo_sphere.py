"""What files say about the part of the sphere that they show. The pictures in `inputs/` encode each pixel's ray as a
colour, so that where it belongs can be computed."""

from pathlib import Path

import numpy as np
import pytest
from panorama_vlm.geometry_panorama import View
from panorama_vlm.reading_panorama import read_panorama

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
