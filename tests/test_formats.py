"""Formats by OpenImageIO and pillow-heif: compared with tifffile, OpenEXR and OpenCV."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.data.collators import VisionCollator
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.reading_panorama import open_image, read_panorama, read_photo_sphere
from panorama_vlm.tests.test_reading import crop_values, photo_sphere
from PIL import Image

FLOAT = Path(__file__).parent / "inputs" / "float32.tif"


def reinhard(light):
    """Reinhard et al. 2002, equations 1 to 3 with a = 0.18, and IEC 61966-2-1, in float64."""
    luminance = light.astype(np.float64) @ [0.2126, 0.7152, 0.0722]
    scale = 0.18 / np.exp(np.log(luminance[luminance > 0]).mean())
    shown = light * scale / (1 + luminance * scale)[..., None]
    shown = np.clip(np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055), 0, 1)
    return shown * 255


@pytest.fixture
def light(panoramas):
    """A linear picture [256, 512, 3] with a sun."""
    found = (np.array(panoramas[0]) / 255.0) ** 2.2 * 300 + 0.01
    found[40:44, 100:104] = 60_000
    return found.astype(np.float32)


pytestmark = pytest.mark.tools


@pytest.mark.parametrize("way", ["path", "bytes"])
def test_a_float_tiff_in_0_to_1_is_read_as_it_is(way):
    pytest.importorskip("OpenImageIO")
    tifffile = pytest.importorskip("tifffile")
    pixels = read_panorama(FLOAT if way == "path" else FLOAT.read_bytes()).pixels
    assert np.abs(pixels.numpy() - 255 * tifffile.imread(FLOAT)).max() <= 0.501


@pytest.mark.parametrize("options", [{}, {"tile": (32, 32)}, {"compression": "deflate"}, {"bigtiff": True}], ids=str)
def test_planar_sixteen_bit_is_no_noise(panoramas, tmp_path, options):
    pytest.importorskip("OpenImageIO")
    tifffile = pytest.importorskip("tifffile")
    wide = np.array(panoramas[0]).astype(np.uint16) * 257
    path = tmp_path / "planar.tif"
    tifffile.imwrite(path, wide.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", **options)
    found = read_panorama(path).pixels
    assert np.array_equal(found, np.array(panoramas[0]))
    again = read_panorama(path.read_bytes()).pixels
    assert torch.equal(found, again)


@pytest.mark.parametrize("options", [{}, {"compression": "deflate"}, {"planarconfig": "separate"}], ids=str)
def test_a_float_tiff_beyond_1_is_linear_light_and_its_photo_sphere_data_are_read(light, tmp_path, options):
    pytest.importorskip("OpenImageIO")
    tifffile = pytest.importorskip("tifffile")
    xmp = photo_sphere(**crop_values((1024, 512), (512, 256), 100, 200))
    tags = [(700, "B", len(xmp), xmp, True)]
    stored = light.transpose(2, 0, 1) if "planarconfig" in options else light
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extratags=tags, **options)
    panorama = read_panorama(tmp_path / "a.tif")
    assert panorama.pixels.shape == (512, 1024, 3) and panorama.covered is not None
    assert np.abs(panorama.pixels[100:356, 200:712].numpy() - reinhard(light)).max() <= 1


@pytest.mark.parametrize("way", ["path", "bytes"])
def test_openexr_is_shown_by_the_stated_curve(light, tmp_path, way):
    pytest.importorskip("OpenImageIO")
    exr = pytest.importorskip("OpenEXR")
    path = str(tmp_path / "a.exr")
    channels = {"RGB": light}
    exr.File({"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}, channels).write(path)
    stored = exr.File(path).channels()["RGB"].pixels
    found = read_panorama(path if way == "path" else Path(path).read_bytes()).pixels
    assert np.abs(found.numpy() - reinhard(stored)).max() <= 1


def test_radiance_is_shown_by_the_stated_curve(light, tmp_path):
    pytest.importorskip("OpenImageIO")
    cv2 = pytest.importorskip("cv2")
    path = str(tmp_path / "a.hdr")
    cv2.imwrite(path, np.ascontiguousarray(light[..., ::-1]))
    stored = cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert np.abs(read_panorama(path).pixels.numpy() - reinhard(stored)).max() <= 2  # two decoders of 8 bit a colour


def test_heic_is_read_in_training_without_code_of_the_users_own(panoramas, tmp_path, make):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(panoramas[0]).save(tmp_path / "a.heic", quality=95)
    Image.OPEN.pop("HEIF", None)
    (tmp_path / "t.jsonl").write_text('{"image": "a.heic"}\n')
    samples, _ = open_data([DataSource(str(tmp_path / "t.jsonl"))], stage="vision", seed=0)
    _, processor = make()
    skipped = []
    batch = VisionCollator(processor, seed=0, random_heading=False)([samples[0]], skipped)
    assert not skipped
    expected = processor.image_processor(panoramas[0], return_tensors="pt")["pixel_values"]
    assert (batch["pixel_values"] - expected).abs().mean() < 0.03


def test_photo_sphere_data_and_transparency_of_heic_are_read(panoramas, tmp_path):
    heif = pytest.importorskip("pillow_heif")
    part = panoramas[0].convert("RGBA")
    part.paste((0, 0, 0, 0), (0, 0, 256, 256))
    xmp = photo_sphere(**crop_values((1024, 512), part.size, 100, 200), PosePitchDegrees=17)
    heif.from_pillow(part).save(tmp_path / "a.heic", quality=95, xmp=xmp)
    with open_image(tmp_path / "a.heic") as image:
        sphere = read_photo_sphere(image)
    assert (sphere.full, sphere.crop, sphere.top, sphere.left, sphere.pitch) == ((512, 1024), (256, 512), 100, 200, 17)
    panorama = read_panorama(tmp_path / "a.heic", level=False)
    assert panorama.covered == (100 / 512, 356 / 512, 200 / 1024, 712 / 1024)
    assert panorama.seen[100:356, 456:712].all() and panorama.seen.sum() == 256 * 256
    if shutil.which("exiftool"):
        said = subprocess.run(
            ["exiftool", "-n", "-XMP-GPano:PosePitchDegrees", "-s3", tmp_path / "a.heic"], capture_output=True
        )
        assert float(said.stdout) == 17


def test_damaged_and_odd_files_are_named(light, tmp_path):
    pytest.importorskip("OpenImageIO")
    exr = pytest.importorskip("OpenEXR")
    header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
    exr.File(header, {"RGB": light}).write(str(tmp_path / "a.exr"))
    data = (tmp_path / "a.exr").read_bytes()
    (tmp_path / "half.exr").write_bytes(data[: len(data) // 2])
    (tmp_path / "head.exr").write_bytes(data[:40])
    holes = light.copy()
    holes[3, 4] = np.nan
    exr.File(header, {"RGB": holes}).write(str(tmp_path / "holes.exr"))
    exr.File(header, {"depth.Z": light[..., 0], "depth.V": light[..., 0]}).write(str(tmp_path / "depth.exr"))
    for name in ("half", "head", "holes", "depth"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name}\.exr: "):
            read_panorama(tmp_path / f"{name}.exr")
    with pytest.raises(ValueError, match="max_pixels"):
        PanoramaImageProcessor(max_pixels=1000)(tmp_path / "a.exr")
