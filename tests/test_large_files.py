"""Large files: what reading them takes follows from the views, and what it may take is an option."""

import os
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.reading_panorama import MAX_PIXELS, read_panorama
from panorama_vlm.tests.test_reading import crop_values, encoded, photo_sphere
from PIL import Image

MIB = 2**20
MEASURE = """
import os, sys, time, warnings
from panorama_vlm import PanoramaImageProcessor
warnings.simplefilter("ignore")
processor = PanoramaImageProcessor(image_size=64)
processor(sys.argv[1], return_tensors="pt")

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

for path in sys.argv[2:]:
    if os.fork():  # each begins with the memory of the small one
        os.wait()
        continue
    before, start = peak(), time.process_time()
    processor(path, return_tensors="pt")
    print(peak() - before, time.process_time() - start, flush=True)
    os._exit(0)
"""


def flat_png(path, width, height, bits, kind):
    """A PNG of zeros, written without holding it; `kind` 0 is grey, 6 RGBA."""
    channels = {0: 1, 2: 3, 6: 4}[kind]
    row = bytes(1) + (bytes(channels * bits // 8) if kind != 6 else b"\0\0\0\xff") * width  # RGBA is opaque
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    return path


def grey16(folder):
    return flat_png(folder / "grey16.png", 18_000, 9_000, 16, 0)


def rgba(folder):
    return flat_png(folder / "rgba.png", 12_000, 6_000, 8, 6)


def odd_claim(folder):
    """A small JPEG that claims to be the middle of a sphere of odd size."""
    xmp = photo_sphere(**crop_values((32_766, 16_383), (3000, 1500), 8001, 12_001))
    path = folder / "claim.jpg"
    Image.new("RGB", (3000, 1500), "red").save(path, xmp=xmp)
    return path


def odd_jpeg(folder):
    path = folder / "odd.jpg"
    Image.new("L", (32_766, 16_383), 90).save(path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isfile("/proc/self/status"), reason="memory is read from /proc")
def test_memory_and_time_follow_from_the_views_and_the_decoder(tmp_path):
    Image.new("RGB", (512, 256)).save(tmp_path / "small.png")
    decoders = {odd_claim: 0, odd_jpeg: 0, rgba: 4 * 72e6, grey16: 2 * 162e6}
    paths = [str(path) for path in (tmp_path / "small.png", *(make(tmp_path) for make in decoders))]
    command = [sys.executable, "-P", "-c", textwrap.dedent(MEASURE), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for (make, decoder), line in zip(decoders.items(), done.stdout.splitlines(), strict=True):
        kib, seconds = map(float, line.split())
        words = f"{make.__name__}: {kib / 1024:.0f} MiB, {seconds:.1f} s"
        print(words)
        assert kib * 1024 < decoder + 200 * MIB, words
        assert seconds < 10, words


def test_a_jpeg_of_220_megapixels_is_read_without_a_word(tmp_path):
    Image.new("RGB", (20_992, 10_496), (10, 200, 90)).save(tmp_path / "stitched.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_panorama(tmp_path / "stitched.jpg", 1407).pixels
    assert pixels.shape == (1312, 2624, 3)
    assert (pixels.float() - torch.tensor([10.0, 200, 90])).abs().max() <= 2


def test_what_would_hold_more_than_max_pixels_is_refused_with_a_way_out(tmp_path):
    flat_png(tmp_path / "a.png", 2048, 1024, 8, 0)
    with pytest.raises(ValueError, match=r"a\.png: it is 2048 x 1024 .*hold 2097152, and max_pixels is 1000000"):
        PanoramaImageProcessor(image_size=32, max_pixels=1_000_000)(tmp_path / "a.png")
    PanoramaImageProcessor(image_size=32, max_pixels=2**21)(tmp_path / "a.png")
    with pytest.raises(ValueError, match="max_pixels must be positive, got 0"):
        PanoramaImageProcessor(max_pixels=0)
    jpeg = encoded(Image.new("RGB", (2048, 1024)), "JPEG")
    assert read_panorama(jpeg, 256, max_pixels=256 * 128).pixels.shape == (128, 256, 3)  # it is reduced before
    with pytest.raises(ValueError, match="would hold 2097152"):
        read_panorama(jpeg, max_pixels=1_000_000)
    progressive = encoded(Image.new("RGB", (2048, 1024)), "JPEG", progressive=True)
    with pytest.raises(ValueError, match="would hold 2097152"):
        read_panorama(progressive, 256, max_pixels=1_000_000)  # all its coefficients are held
    assert PanoramaImageProcessor().to_dict()["max_pixels"] == MAX_PIXELS


def test_a_sphere_that_is_too_large_to_be_laid_out_is_refused():
    xmp = photo_sphere(**crop_values((32_766, 16_383), (64, 32), 0, 0))
    claim = encoded(Image.new("RGB", (64, 32)), "JPEG", xmp=xmp)
    with pytest.raises(ValueError, match="32766 x 16383 pixels, and max_pixels is 268435456"):
        read_panorama(claim)
    assert 400 <= read_panorama(claim, 400).pixels.shape[1] < 800


def brute_force(pixels, full, top, left, canvas, fill):
    """Means over the cells of a canvas, by oversampling every pixel of the whole sphere 4 x 4 (exact where the cells
    are multiples of a quarter pixel)."""
    whole = np.empty((*full, 3))
    whole[:] = np.array(fill) * 255
    whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    fine = whole.repeat(4, 0).repeat(4, 1)
    rows, columns = fine.shape[0] // canvas[0], fine.shape[1] // canvas[1]
    return fine.reshape(canvas[0], rows, canvas[1], columns, 3).mean((1, 3))


@pytest.mark.parametrize("scale", [1, 2])
def test_pixels_are_laid_out_by_exact_areas(monkeypatch, scale):
    """A crop at an odd place of a sphere of 30 x 60, on 8 x 16 cells of 3.75 pixels."""
    rng = np.random.default_rng(0)
    part = rng.integers(0, 256, (11, 17, 3)).repeat(scale, 0).repeat(scale, 1)[:21, :33].astype(np.uint8)
    from panorama_vlm.placing_panorama import _laid

    reduced = torch.tensor(np.ascontiguousarray(part[::scale, ::scale]))
    neutral = torch.tensor([51, 102, 153], dtype=torch.uint8)
    size = part.shape[:2]
    laid = _laid(reduced, scale, size, (30, 60, 5, 7), (8, 16), neutral)
    expected = brute_force(part, (30, 60), 5, 7, (8, 16), (0.2, 0.4, 0.6))
    assert np.abs(laid.numpy() - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_large_file_of_any_size_looks_where_it_should(monkeypatch, format):
    """Each pixel is the colour of its direction; a file counts as large from a few pixels on."""
    for room in ("reading", "placing"):
        monkeypatch.setattr(f"panorama_vlm.{room}_panorama.LARGE", 1000)
    for width, height, top, left in ((1999, 1000, 0, 0), (801, 401, 203, 1003), (2000, 999, 0, 0)):
        full_width, full_height = (width, height) if top == 0 else (2001, 1001)
        yaw = (np.arange(width) + left + 0.5) / full_width
        pitch = (np.arange(height) + top + 0.5) / full_height
        array = np.stack(np.broadcast_arrays(255 * yaw, 255 * pitch[:, None], 128), -1)
        values = crop_values((full_width, full_height), (width, height), top, left)
        if format == "JPEG":
            data = encoded(
                Image.fromarray(array.round().astype(np.uint8)),
                *("JPEG",),
                quality=100,
                subsampling=0,
                xmp=photo_sphere(**values),
            )
        else:
            if top:
                continue
            data = encoded(Image.fromarray(array.round().astype(np.uint8)))
        panorama = read_panorama(data, 240)
        pixels = panorama.pixels.numpy().astype(float)
        assert 240 <= pixels.shape[1] < 500
        place = np.stack(
            np.broadcast_arrays(
                (np.arange(pixels.shape[1]) + 0.5) / pixels.shape[1],
                ((np.arange(pixels.shape[0]) + 0.5) / pixels.shape[0])[:, None],
            ),
            -1,
        )
        top_share, bottom, left_share, right = panorama.covered or (0, 1, 0, 1)
        margin = 1.5 / 240
        inside = (place[..., 0] > left_share + margin) & (place[..., 0] < right - margin)
        inside &= (place[..., 1] > top_share + margin) & (place[..., 1] < bottom - margin)
        apart = (pixels[..., :2] / 255 - place)[inside]  # of a grey level each: 0.5 in each rounding, 1 by JPEG
        assert inside.sum() > 1000 and np.abs(apart).max() < 2.5 / 255
        assert np.abs(apart.mean(0)).max() < 0.25 / 240  # a quarter of a pixel


def test_whatever_a_decoder_raises_names_the_file(tmp_path, panoramas):
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    rng = np.random.default_rng(0)
    whole = encoded(panoramas[0], "AVIF")
    for number in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            damaged[place] = rng.integers(256)
        if number % 3 == 0:
            damaged = damaged[: rng.integers(20, len(whole))]
        (tmp_path / "damaged.avif").write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_panorama(tmp_path / "damaged.avif")
        except ValueError as error:
            assert "damaged.avif" in str(error)
