import contextlib
import gc
import io
import math
import struct
import sys
import time
import tracemalloc
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.geometry_panorama import ViewOptions
from panorama_vlm.reading_panorama import PhotoSphere, read_panorama, read_photo_sphere, to_erp_tensor
from panorama_vlm.sampling_panorama import view_mask
from PIL import Image

XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" %s>%s</rdf:Description>
</rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


def photo_sphere(as_elements=False, **values):
    """An XMP packet with GPano values, as attributes or as elements."""
    if as_elements:
        return (XMP % ("", "".join(f"<GPano:{k}>{v}</GPano:{k}>" for k, v in values.items()))).encode()
    return (XMP % (" ".join(f'GPano:{k}="{v}"' for k, v in values.items()), "")).encode()


def crop_values(full, crop, top, left, **more):
    return {
        "ProjectionType": "equirectangular",
        "FullPanoWidthPixels": full[0],
        "FullPanoHeightPixels": full[1],
        "CroppedAreaImageWidthPixels": crop[0],
        "CroppedAreaImageHeightPixels": crop[1],
        "CroppedAreaLeftPixels": left,
        "CroppedAreaTopPixels": top,
        **more,
    }


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture
def processor():
    return PanoramaImageProcessor(image_size=32)


def views(processor, image, **options):
    return processor(image, return_tensors="pt", **options)["pixel_values"]


# Kinds of input


def test_every_kind_of_input_gives_the_same_views(processor, panoramas, tmp_path):
    panorama = panoramas[0]
    array = np.array(panorama)
    data = encoded(panorama)
    (tmp_path / "a.png").write_bytes(data)
    expected = views(processor, panorama)[0]
    exact = {
        "path": str(tmp_path / "a.png"),
        "Path": tmp_path / "a.png",
        "bytes": data,
        "file object": io.BytesIO(data),
        "open file": open(tmp_path / "a.png", "rb"),  # noqa: SIM115
        "lazy": Image.open(tmp_path / "a.png"),
        "HWC": array,
        "CHW": array.transpose(2, 0, 1),
        "not contiguous": np.asfortranarray(array),
        "tensor HWC": torch.tensor(array),
        "tensor CHW": torch.tensor(array).permute(2, 0, 1),
        "alpha": panorama.convert("RGBA"),
        "array with alpha": np.array(panorama.convert("RGBA")),
        "row of a column": {"bytes": data, "path": None},
        "row with a path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "lossless WebP": encoded(panorama, "WEBP", lossless=True),
        "TIFF": encoded(panorama, "TIFF"),
        "BMP": encoded(panorama, "BMP"),
    }
    for name, image in exact.items():
        torch.testing.assert_close(views(processor, image)[0], expected, rtol=0, atol=1e-6, msg=name)
    step = 1 / 127.5  # a grey level; uint8 is rounded where it is reduced and where it is sampled
    in_float = {
        "float HWC": (array / 255).astype(np.float32),
        "float64 CHW": (array / 255).transpose(2, 0, 1),
        "float tensor": torch.tensor(array / 255),
        "uint16": array.astype(np.uint16) * 257,
        "big-endian uint16": (array.astype(np.uint16) * 257).astype(">u2"),
        "uint16 tensor": torch.tensor((array.astype(np.uint16) * 257).astype(np.int32)).to(torch.uint16),
    }
    for name, image in in_float.items():
        torch.testing.assert_close(views(processor, image)[0], expected, rtol=0, atol=step, msg=name)
        torch.testing.assert_close(views(processor, image), views(processor, array / 255), rtol=0, atol=1e-5, msg=name)
    batch = views(processor, [panorama, [tmp_path / "a.png", array]])  # nested, of all kinds
    assert torch.equal(batch, expected.expand(3, -1, -1, -1, -1))
    assert torch.equal(views(processor, np.stack([array, array])), expected.expand(2, -1, -1, -1, -1))


def test_grey_palette_and_16_bit_images_give_the_views_of_their_colours(processor, panoramas):
    grey = panoramas[1].convert("L")
    expected = views(processor, grey.convert("RGB"))
    sixteen = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    same = [grey, np.array(grey), np.array(grey)[None], np.array(grey)[..., None], encoded(grey), grey.convert("LA")]
    for image in same:
        torch.testing.assert_close(views(processor, image), expected, rtol=0, atol=1e-6)
    for image in (sixteen, encoded(sixteen), encoded(sixteen, "TIFF"), sixteen.convert("I")):
        torch.testing.assert_close(views(processor, image), expected, rtol=0, atol=1 / 127.5)
    palette = panoramas[1].quantize(64)
    torch.testing.assert_close(views(processor, encoded(palette)), views(processor, palette.convert("RGB")))
    floats = Image.fromarray((np.array(grey) / 255).astype(np.float32))
    assert floats.mode == "F"
    torch.testing.assert_close(views(processor, floats), expected, rtol=0, atol=1 / 127.5)


def test_cmyk_and_avif_files_are_read(processor, panoramas):
    expected = views(processor, panoramas[2])
    cmyk = encoded(panoramas[2].convert("CMYK"), "JPEG", quality=98, subsampling=0)
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    assert (views(processor, cmyk) - expected).abs().mean() < 2 / 127.5
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    assert (views(processor, encoded(panoramas[2], "AVIF", quality=95)) - expected).abs().mean() < 3 / 127.5


def test_transparent_parts_are_filled_with_the_mean(panoramas):
    processor = PanoramaImageProcessor(image_size=32, image_mean=(0.2, 0.4, 0.6))
    image = panoramas[0].convert("RGBA")
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (200, 0, 312, 256))  # of the tiles, those at 135, 180 and 225 degrees look elsewhere
    image.putalpha(alpha)
    for source in (image, np.array(image), np.array(image) / 255):
        assert views(processor, source)[0, 4:7].abs().max() < 1 / 127.5
        assert views(processor, source)[0, 1].abs().max() > 0.5
    image.putalpha(0)
    for source in (image, np.array(image)):
        with pytest.raises(ValueError, match="all of it is transparent: there is nothing to see"):
            processor(source)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(panoramas, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what turns an upright image into the stored one
    stored = panoramas[0].transpose(undo[orientation]) if orientation > 1 else panoramas[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        data = encoded(stored, format, exif=exif)
        torch.testing.assert_close(to_erp_tensor(data), to_erp_tensor(panoramas[0]))


def test_columns_of_datasets_come_as_they_are(processor, panoramas, tmp_path):
    panoramas[0].save(tmp_path / "a.png")
    column = Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", ImageColumn())
    undecoded = column.cast_column("image", ImageColumn(decode=False))
    for source in (column[0]["image"], column[:]["image"], undecoded[0]["image"]):
        torch.testing.assert_close(views(processor, source), views(processor, panoramas[0]))


def test_datasets_map_with_two_processes_makes_the_same_views(processor, panoramas, tmp_path):
    paths = []
    for index, panorama in enumerate(panoramas[:4]):
        panorama.save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    made = Dataset.from_dict({"image": paths}).map(
        lambda row: {"views": processor(row["image"], return_tensors="np")["pixel_values"][0]}, num_proc=2
    )
    for row, panorama in zip(made.with_format("torch"), panoramas[:4], strict=True):
        torch.testing.assert_close(row["views"], views(processor, panorama)[0])


# Decoding small


def test_a_jpeg_is_decoded_no_larger_than_needed_and_its_lazy_image_is_left_alone(mosaic, tmp_path, psnr):
    mosaic.save(tmp_path / "a.jpg", quality=95)
    assert read_panorama(tmp_path / "a.jpg", 1300).pixels.shape == (1024, 2048, 3)
    assert read_panorama(tmp_path / "a.jpg", 500).pixels.shape == (256, 512, 3)
    assert read_panorama(tmp_path / "a.jpg").pixels.shape == (2048, 4096, 3)
    lazy = Image.open(tmp_path / "a.jpg")
    small = read_panorama(lazy, 1300).pixels
    assert small.shape == (1024, 2048, 3)
    assert lazy.size == (4096, 2048) and lazy.tile  # still to be decoded, and at full size
    by_area = mosaic.resize((2048, 1024), Image.Resampling.BOX)
    assert psnr(small, np.array(by_area), 255) > 35
    assert psnr(np.array(lazy), np.array(mosaic), 255) > 30


def outcome(data, needed_width):
    """Pixels, or what is wrong."""
    try:
        return read_panorama(data, needed_width).pixels.tolist()
    except ValueError as error:
        return str(error)


def both_outcomes(monkeypatch, data, needed_width):
    """With simplejpeg, and with Pillow alone."""
    with_simplejpeg = outcome(data, needed_width)
    with monkeypatch.context() as without:
        without.setattr("panorama_vlm.reading_panorama.simplejpeg", None)
        return with_simplejpeg, outcome(data, needed_width)


@pytest.mark.parametrize(
    ("mode", "options", "fast"),
    [
        ("RGB", {"subsampling": "4:4:4"}, True),
        ("RGB", {"subsampling": "4:2:2"}, True),
        ("RGB", {"subsampling": "4:2:0"}, True),
        ("RGB", {"progressive": True}, True),
        ("L", {}, True),
        ("CMYK", {}, False),
        ("RGB", {"exif": Image.Exif(), "orientation": 3}, False),
        ("RGB", {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (64, 32))]}, True),
    ],
    ids=["4:4:4", "4:2:2", "4:2:0", "progressive", "grey", "CMYK", "upside down", "MPO"],
)
def test_simplejpeg_gives_the_pixels_of_pillow(panoramas, monkeypatch, mode, options, fast):
    simplejpeg = pytest.importorskip("simplejpeg")
    calls, decode = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *args, **kwargs: (calls.append(1), decode(*args, **kwargs))[1]
    )
    options = {"format": "JPEG", "quality": 90, **options}
    if "orientation" in options:
        options["exif"][0x0112] = options.pop("orientation")
    data = encoded(panoramas[0].resize((256, 128)).convert(mode), **options)
    for scale in (1, 2, 4, 8):
        calls.clear()
        ours, by_pillow = both_outcomes(monkeypatch, data, 256 / scale)
        assert len(ours) == 128 / scale and ours == by_pillow
        assert len(calls) == fast


def test_a_damaged_jpeg_is_read_or_refused_as_pillow_does(panoramas, monkeypatch):
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    refused = []
    for progressive in (False, True):
        whole = encoded(panoramas[0].resize((256, 128)), "JPEG", progressive=progressive)
        damaged = [whole[:length] for length in rng.integers(300, len(whole), 20)]
        for place in rng.integers(20, len(whole) - 2, 100):
            damaged.append(whole[:place] + b"\xff*" + whole[place + 2 :])  # an unknown marker, where it is one
        for data in damaged:
            ours, by_pillow = both_outcomes(monkeypatch, data, 128)
            assert ours == by_pillow
            refused.append(isinstance(ours, str))
    assert 40 <= sum(refused) < len(refused)


def test_a_size_that_the_scale_does_not_divide_is_decoded_whole(mosaic, tmp_path):
    mosaic.resize((4094, 2047)).save(tmp_path / "a.jpg")
    assert read_panorama(tmp_path / "a.jpg", 1300).pixels.shape == (2047, 4094, 3)


# Partial panoramas


@pytest.mark.parametrize("as_elements", [False, True])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photo_sphere_data_are_read(panoramas, as_elements, format):
    values = crop_values((1024, 512), (512, 256), 100, 200, PoseHeadingDegrees=123.5)
    packet = photo_sphere(as_elements, **values)
    if format == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        data = encoded(panoramas[0], format, pnginfo=info)
    elif format == "TIFF":
        data = encoded(panoramas[0], format, tiffinfo={700: packet})
    else:
        data = encoded(panoramas[0], format, xmp=packet)
    found = read_photo_sphere(Image.open(io.BytesIO(data)))
    assert found == PhotoSphere(full=(512, 1024), crop=(256, 512), top=100, left=200, heading=123.5)


@pytest.mark.parametrize("needed_width", [math.inf, 600])
def test_a_partial_panorama_lies_where_the_camera_saw_it_and_the_rest_is_neutral(mosaic, tmp_path, needed_width):
    top, left, height, width = 512, 1024, 1024, 2048
    part = mosaic.crop((left, top, left + width, top + height))
    data = encoded(part, "JPEG", quality=95, xmp=photo_sphere(**crop_values((4096, 2048), (width, height), top, left)))
    panorama = read_panorama(data, needed_width, fill=(0.2, 0.4, 0.6))
    k = 4096 // panorama.pixels.shape[1]
    assert k == (1 if needed_width == math.inf else 4)
    assert panorama.covered == (0.25, 0.75, 0.25, 0.75)
    expected = np.full((2048, 4096, 3), np.array([51, 102, 153]), np.uint8)
    expected[top : top + height, left : left + width] = np.array(part)
    expected = expected.reshape(2048 // k, k, 4096 // k, k, 3).mean((1, 3))
    apart = np.abs(panorama.pixels.numpy() - expected)
    assert apart.mean() < 2
    outside = np.ones(apart.shape[:2], bool)
    outside[top // k : (top + height) // k, left // k : (left + width) // k] = False
    assert apart[outside].max() == 0


def test_views_that_see_only_fill_are_masked(panoramas):
    # It sees yaw from -42 to 42: of the tiles at 90, 135, 180, 225 and 270 degrees none shows any of it.
    xmp = photo_sphere(**crop_values((512, 256), (120, 128), 64, 196))
    data = encoded(panoramas[0].crop((0, 0, 120, 128)), "JPEG", xmp=xmp)
    processor = PanoramaImageProcessor(image_size=32)
    out = processor([data, panoramas[0]], return_tensors="pt")
    expected = [True, True, True, False, False, False, False, False, True]  # global, 0, 45, 90, 135, 180, ...
    assert out["view_mask"].tolist() == [expected, [True] * 9]
    assert out["pixel_values"][0][3:8].abs().max() < 1 / 127.5
    assert "view_mask" not in processor(panoramas[0], return_tensors="pt")


def test_the_mask_agrees_with_what_the_views_show():
    """Brute force: white where the camera saw, black elsewhere; a view is masked where it is all black."""
    generator = np.random.default_rng(0)
    views = ViewOptions("e2p", 60.0, 0.3, (-60.0, 0.0, 60.0), True, image_size=64)
    plan = views.plan
    processor = PanoramaImageProcessor(**asdict(views), image_mean=(0, 0, 0), image_std=(1, 1, 1))
    for _ in range(12):
        width, height = 8 * generator.integers(4, 56), 8 * generator.integers(4, 28)
        left, top = 8 * generator.integers(0, 64 - width // 8), 8 * generator.integers(0, 32 - height // 8)
        white = Image.new("RGB", (int(width), int(height)), "white")
        xmp = photo_sphere(**crop_values((512, 256), (width, height), top, left))
        yaw = float(generator.integers(0, 360))
        out = processor(encoded(white, "JPEG", xmp=xmp), yaw_offsets=[yaw], return_tensors="pt")
        shown = out["pixel_values"][0].mean((1, 2, 3))  # the share of a view that is white
        mask = out["view_mask"][0] if "view_mask" in out else torch.ones(plan.num_views, dtype=torch.bool)
        least = min(0.01, shown.max())
        assert (mask | (shown < least + 0.004)).all()
        assert (~mask | (shown > least - 0.004)).all()
        panorama = read_panorama(encoded(white, "JPEG", xmp=xmp), yaw_offset=yaw)
        assert torch.equal(mask, view_mask(plan, panorama.covered, min_seen=0.01))
        out = processor(encoded(white, "JPEG", xmp=xmp), yaw_offsets=[yaw], min_seen=0.3, return_tensors="pt")
        least = min(0.3, shown.max())
        assert (out["view_mask"][0] | (shown < least + 0.02)).all()
        assert (~out["view_mask"][0] | (shown > least - 0.02)).all()


@contextlib.contextmanager
def no_file_left_open():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert not [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_file_is_closed_when_it_is_read(panoramas, tmp_path, kind):
    path = tmp_path / f"panorama.{kind.lower()}"
    panoramas[0].save(path, kind)
    processor = PanoramaImageProcessor(image_size=32)
    with no_file_left_open():
        read_panorama(path)
        by_path = processor(str(path), return_tensors="pt")["pixel_values"]
        by_row = processor({"bytes": None, "path": str(path)}, return_tensors="pt")["pixel_values"]
        cached = processor([path], cache_dir=str(tmp_path / "cache"), return_tensors="pt")["pixel_values"]
    assert torch.equal(by_path, by_row)
    torch.testing.assert_close(cached, by_path, rtol=0, atol=1 / 127.5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_file_that_cannot_be_read_is_closed_too(panoramas, tmp_path, kind):
    data = encoded(panoramas[0], kind)
    (tmp_path / f"broken.{kind.lower()}").write_bytes(data[: len(data) // 2])
    (tmp_path / "no_image.png").write_bytes(b"no image at all")
    with no_file_left_open():
        for name in (f"broken.{kind.lower()}", "no_image.png"):
            with pytest.raises(ValueError, match=f"cannot read .*{name}"):
                read_panorama(tmp_path / name)


def test_the_bytes_of_a_row_are_read_and_not_the_file_that_its_path_names(panoramas, tmp_path):
    """Pillow maps uncompressed files by name."""
    for number, kind in ((0, "PGM"), (1, "BMP"), (2, "TIFF")):
        path = tmp_path / f"row.{kind.lower()}"
        grey = panoramas[number].convert("L")
        grey.save(path)
        data = path.read_bytes()
        grey.rotate(180).save(path)
        read = read_panorama({"bytes": data, "path": str(path)}).pixels
        assert torch.equal(read[..., 0], torch.tensor(np.array(grey))), kind


def test_prepared_views_leave_no_file_open(panoramas, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, panorama in zip(paths, panoramas, strict=False):
        panorama.save(path)
    processor = PanoramaImageProcessor(image_size=16, cache_dir=tmp_path / "cache")
    with no_file_left_open():
        for _ in range(2):
            processor(paths, return_tensors="pt")


def test_a_file_object_stays_open(panoramas):
    file = io.BytesIO(encoded(panoramas[0], "PNG"))
    read_panorama(file)
    assert not file.closed
    file = io.BytesIO(encoded(panoramas[0], "PNG")[:2000])
    with pytest.raises(ValueError, match="cannot read"):
        read_panorama(file)
    assert not file.closed


def test_an_image_that_is_not_two_to_one_is_a_band_around_the_horizon_with_a_warning(panoramas):
    band = panoramas[0].crop((0, 64, 512, 192))
    with pytest.warns(UserWarning, match=r"512 x 128 pixels, not 2:1.*the middle 360 x 90 degrees"):
        panorama = read_panorama(band)
    assert panorama.covered == (0.25, 0.75, 0, 1)
    assert torch.equal(panorama.pixels[64:192], torch.tensor(np.array(band)))
    with pytest.warns(UserWarning, match="the middle 180 x 180 degrees"):
        assert read_panorama(panoramas[0].resize((256, 256))).covered == (0, 1, 0.25, 0.75)
    with pytest.raises(ValueError, match="512 x 128 pixels, not 2:1.*strict_aspect=False"):
        PanoramaImageProcessor(image_size=32)(band, strict_aspect=True)
    xmp = photo_sphere(**crop_values((512, 256), (512, 128), 64, 0))
    PanoramaImageProcessor(image_size=32, strict_aspect=True)(encoded(band, "JPEG", xmp=xmp))  # known, so no guess


def test_north_comes_to_the_front_where_it_is_asked_for(panoramas):
    plain = encoded(panoramas[0], "JPEG", quality=95)
    looks_east = encoded(panoramas[0], "JPEG", quality=95, xmp=photo_sphere(PoseHeadingDegrees=90))
    processor = PanoramaImageProcessor(image_size=64)
    usual, north = views(processor, plain)[0], views(processor, looks_east, align_heading=True)[0]
    assert torch.equal(views(processor, looks_east)[0], usual)
    torch.testing.assert_close(north[1], usual[7])  # what was 90 degrees to the left is the front
    torch.testing.assert_close(views(processor, plain, yaw_offsets=[-90])[0], north)
    with pytest.raises(ValueError, match="one angle a panorama, got 1 for 2"):
        processor([plain, plain], yaw_offsets=[5.0])


@pytest.mark.parametrize(
    "values",
    [
        crop_values((512, 256), (128, 128), 200, 0),  # passes the lower edge
        crop_values((512, 100), (512, 100), 0, 0),  # no sphere
        crop_values((10**9, 5 * 10**8), (512, 256), 0, 0),  # would fill the memory
        crop_values((0, 0), (512, 256), 0, 0),
    ],
)
def test_photo_sphere_data_that_cannot_be_are_ignored_with_a_warning(panoramas, values):
    with pytest.warns(UserWarning, match="do not fit its 512 x 256 pixels, ignored"):
        panorama = read_panorama(encoded(panoramas[0], "JPEG", xmp=photo_sphere(**values)))
    assert panorama.pixels.shape == (256, 512, 3) and panorama.covered is None


def test_an_xml_bomb_is_ignored_with_a_warning(panoramas):
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><x xmlns:GPano="http://ns.google.com/photos/1.0/panorama/">&a;</x>'
    with pytest.warns(UserWarning, match="cannot be read, ignored"):
        assert read_photo_sphere(Image.open(io.BytesIO(encoded(panoramas[0], "JPEG", xmp=bomb)))) is None


# What is broken


def png_header(width, height):
    """A PNG that promises much and holds little."""
    tiny = bytearray(encoded(Image.new("RGB", (1, 1))))
    import struct
    import zlib

    tiny[16:24] = struct.pack(">II", width, height)
    tiny[29:33] = struct.pack(">I", zlib.crc32(tiny[12:29]))
    return bytes(tiny)


def test_a_file_with_the_ending_of_another_format_is_read_with_a_warning(panoramas, tmp_path):
    (tmp_path / "named.png").write_bytes(encoded(panoramas[0], "JPEG"))
    with pytest.warns(UserWarning, match="named.png is named as PNG, but holds JPEG: read as what it holds"):
        pixels = read_panorama(tmp_path / "named.png").pixels
    assert torch.equal(pixels, read_panorama(encoded(panoramas[0], "JPEG")).pixels)


def test_the_size_in_a_warning_is_that_of_the_file_and_not_what_was_decoded(tmp_path):
    Image.new("RGB", (400, 304)).save(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="400 x 304 pixels, not 2:1"):
        PanoramaImageProcessor(image_size=16)(str(tmp_path / "a.jpg"))


def broken_files(panorama):
    jpeg, png = encoded(panorama, "JPEG"), encoded(panorama)
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "empty.jpg": (b"", "it is empty"),
        "gif.jpg": (encoded(panorama, "GIF"), "it holds a GIF"),
        "pdf.jpg": (encoded(panorama, "PDF"), "it holds a PDF"),
        "page.jpg": (b"<!DOCTYPE html><p>404", "it holds a web page"),
        "noise.jpg": (bytes(range(256)) * 40, "it is none of JPEG"),
        "wide.png": (png_header(65_000, 100), "65000 x 100 pixels, a side must have 1 to 32767"),
        "bomb.png": (png_header(32_000, 16_000), "max_pixels is 268435456"),
        "damaged.png": (png[:200] + b"damage" + png[206:], ""),
    }


@pytest.mark.parametrize("name", broken_files(Image.new("RGB", (4, 2))))
def test_a_broken_file_is_an_error_that_names_it_and_the_reason_within_bounds(panoramas, tmp_path, name):
    data, reason = broken_files(panoramas[0])[name]
    (tmp_path / name).write_bytes(data)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as raised:
        PanoramaImageProcessor(image_size=32)(tmp_path / name)
    assert reason in str(raised.value)
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "BMP", "PPM"])
def test_a_file_of_any_format_that_is_cut_off_is_named(panoramas, tmp_path, format):
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow has no {format}")
    data = encoded(panoramas[0], format)
    (tmp_path / "a.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*a\.bin: \S+"):
        read_panorama(tmp_path / "a.bin")


def planar_tiff():
    """Two by one pixels of 16 bit, each colour in a plane of its own (TIFF 6.0, page 38)."""
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 140)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 3, 152), (284, 3, 1, 2)]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head += bytes(4)
    values = struct.pack("<3H", 16, 16, 16) + struct.pack("<3I", 164, 168, 172) + struct.pack("<3I", 4, 4, 4)
    return head + values + struct.pack("<6H", 0, 65535, 0, 65535, 0, 65535)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (planar_tiff(), "TIFF"),
        ((Path(__file__).parent / "inputs" / "float32.tif").read_bytes(), "TIFF"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 2\n" + bytes(8), "Radiance HDR"),
        (b"\x76\x2f\x31\x01\x02\0\0\0", "OpenEXR"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(20), "HEIC: pip install pillow-heif,"),
    ],
)
def test_what_needs_the_extra_says_so(data, kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "OpenImageIO", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.bin: it is {kind} .*panorama-vlm\[formats\]"):
        read_panorama(tmp_path / "a.bin")


@pytest.mark.parametrize("name", ["truncated.jpg", "truncated.png", "damaged.png"])
def test_a_lazy_image_that_turns_out_broken_is_named_too(processor, panoramas, tmp_path, name):
    data, reason = broken_files(panoramas[0])[name]
    (tmp_path / name).write_bytes(data)
    with Image.open(tmp_path / name) as lazy, pytest.raises(ValueError, match=f"{name}.*{reason}"):
        processor(lazy)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("/no/such/file.jpg", FileNotFoundError, "/no/such/file.jpg"),
        ({"bytes": None, "path": None}, ValueError, "needs 'bytes' or 'path'"),
        (np.full((4, 8, 3), np.nan), ValueError, r"values in \[0, 1\], got \[nan, nan\]"),
        (np.full((4, 8, 3), np.inf), ValueError, r"values in \[0, 1\]"),
        (np.full((4, 8, 3), -0.1), ValueError, r"values in \[0, 1\]"),
        (np.zeros((4, 0, 3), np.uint8), ValueError, r"got \[4, 0, 3\]"),
        (np.zeros((4, 8), np.complex64), ValueError, "dtype uint8, uint16 or float"),
        (np.zeros((1, 40_000, 3), np.uint8), ValueError, "40000 x 1 pixels"),
    ],
)
def test_what_is_no_panorama_is_refused(processor, image, error, message):
    with pytest.raises(error, match=message):
        processor(image)


def test_a_broken_panorama_of_a_batch_is_named(processor, panoramas, tmp_path):
    panoramas[0].save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.png: it is empty"):
        processor([tmp_path / "good.png", tmp_path / "bad.png"])
