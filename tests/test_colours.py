"""Colour profiles: compared with the formulas of the colour spaces in float64."""

import io
from pathlib import Path

import numpy as np
import pytest
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.reading_panorama import read_panorama
from PIL import Image, ImageCms

PROPHOTO = Path(__file__).parent / "inputs" / "prophoto.jpg"
# http://www.brucelindbloom.com/index.html?Eqn_RGB_XYZ_Matrix.html, both for D50
PROPHOTO_TO_XYZ = np.array([[0.7976749, 0.1351917, 0.0313534], [0.2880402, 0.7118741, 0.0000857], [0, 0, 0.82521]])
XYZ_TO_SRGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.033454], [0.0719453, -0.2289914, 1.4052427]]
)


def srgb_of_prophoto(levels):
    """ISO 22028-2 (gamma 1.8 with a straight beginning) to IEC 61966-2-1; [..., 3] in [0, 1], not clipped."""
    linear = np.where(levels < 1 / 32, levels / 16, levels**1.8) @ PROPHOTO_TO_XYZ.T @ XYZ_TO_SRGB.T
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def test_a_profile_other_than_srgb_is_converted():
    encoded = np.array(Image.open(PROPHOTO)) / 255
    expected = srgb_of_prophoto(encoded)
    pixels = read_panorama(PROPHOTO).pixels.numpy() / 255
    inside = ((expected > 0.02) & (expected < 0.98)).all(-1)  # of sRGB; beyond it LittleCMS clips, too
    apart = np.abs(pixels - expected)[inside]
    assert inside.mean() > 0.3 and apart.mean() < 1 / 255 and np.quantile(apart, 0.99) < 3 / 255
    assert np.abs(encoded - expected)[inside].mean() > 4 * apart.mean()


def with_profile(image, profile, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, icc_profile=profile, **options)
    return stream.getvalue()


def test_srgb_costs_nothing_and_a_broken_profile_is_ignored_with_a_word(panoramas):
    plain = read_panorama(panoramas[0]).pixels
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_panorama(with_profile(panoramas[0], srgb)).pixels.equal(plain)
    with pytest.warns(UserWarning, match="colour profile cannot be read, ignored"):
        assert read_panorama(with_profile(panoramas[0], b"no profile at all")).pixels.equal(plain)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "small JPEG", "decoded"])
def test_every_kind_of_image_is_converted(panoramas, mode):
    profile = Image.open(PROPHOTO).info["icc_profile"]
    image = panoramas[1] if mode not in ("RGBA", "P", "L") else panoramas[1].convert(mode)
    if mode == "small JPEG":
        data = with_profile(image, profile, "JPEG", quality=100, subsampling=0)
        found, tolerance = read_panorama(data, image.width // 2).pixels, 0.02
        levels = np.asarray(image, float).reshape(image.height // 2, 2, image.width // 2, 2, 3).mean((1, 3)) / 255
    else:
        source = with_profile(image, profile)
        if mode == "decoded":
            source = Image.open(io.BytesIO(source))
            source.load()
        found, tolerance = read_panorama(source).pixels, 0.004
        levels = np.asarray(image.convert("RGB")) / 255
    expected = srgb_of_prophoto(levels)
    inside = ((expected > 0.02) & (expected < 0.98)).all(-1)
    assert inside.any()
    assert np.abs(found.numpy() / 255 - expected)[inside].mean() < tolerance


def test_prepared_views_of_a_decoded_image_know_its_profile(panoramas, tmp_path):
    processor = PanoramaImageProcessor(image_size=16, cache_dir=tmp_path)
    image = panoramas[0].copy()
    plain = processor(image, return_tensors="pt")["pixel_values"]
    image.info["icc_profile"] = Image.open(PROPHOTO).info["icc_profile"]
    assert not processor(image, return_tensors="pt")["pixel_values"].allclose(plain, atol=0.02)
