"""Colour profiles: compared with the formulas of the colour spaces in float64."""

import io
import struct
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


def icc(kind, space, connection, tags):
    """A profile of version 2 (ICC.1:2001-04) by hand: its header, the table of its tags, and the tags."""
    d50 = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + d50, **tags}
    start, table, content = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">2I", start + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    head = struct.pack(">2I", start + len(content), 0) + b"\2\x40\0\0" + kind + space + connection
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + d50
    return head.ljust(128, b"\0") + table + content


def encode(linear):
    """IEC 61966-2-1, in levels of 255."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def test_grey_and_cmyk_profiles_are_converted():
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(32, 0)
    grey = icc(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(1.8 * 256))})
    found = read_panorama(with_profile(Image.fromarray(ramp), grey)).pixels.numpy()
    assert np.abs(found - encode((ramp[..., None] / 255) ** 1.8)).max() < 2
    assert np.abs(found - ramp[..., None] * 1.0).max() > 5  # what they are without it

    # Paper is white; where there is any ink, lightness falls by the share of black alone.
    identity = b"".join(struct.pack(">I", 0x10000 * (place % 4 == 0)) for place in range(9))
    straight = bytes(range(256))
    grid = bytes(value for node in range(16) for value in (255 * (node % 2 == 0), 128, 128))  # Lab, black is fastest
    table = b"mft1\0\0\0\0\4\3\2\0" + identity + 4 * straight + grid + 3 * straight
    black = icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
    ink = np.zeros((32, 64, 4), np.uint8)
    ink[..., 3] = ramp
    found = read_panorama(with_profile(Image.frombytes("CMYK", (64, 32), ink.tobytes()), black, "TIFF")).pixels.numpy()
    lightness = 100 * (1 - ramp[..., None] / 255.0)
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)  # CIE 15
    assert np.abs(found - encode(luminance)).max() < 2
    assert np.abs(found - (255.0 - ramp[..., None])).max() > 5


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_sixteen_bit_and_float_stay_as_they_are(panoramas, mode):
    grey = np.array(panoramas[0].convert("L"))
    image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32) / 255)
    image.info["icc_profile"] = Image.open(PROPHOTO).info["icc_profile"]
    assert np.abs(read_panorama(image).pixels.numpy() * 255 - grey[..., None]).max() < 1e-3


def test_prepared_views_of_a_decoded_image_know_its_profile(panoramas, tmp_path):
    processor = PanoramaImageProcessor(image_size=16, cache_dir=tmp_path)
    image = panoramas[0].copy()
    plain = processor(image, return_tensors="pt")["pixel_values"]
    image.info["icc_profile"] = Image.open(PROPHOTO).info["icc_profile"]
    assert not processor(image, return_tensors="pt")["pixel_values"].allclose(plain, atol=0.02)
