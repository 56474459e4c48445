"""What files say about the part of the sphere that they show. The pictures in `inputs/` encode each pixel's ray as a
colour, so that where it belongs can be computed."""

import hashlib
import io
import json
import math
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.geometry_panorama import View
from panorama_vlm.placing_panorama import Panorama
from panorama_vlm.reading_panorama import PhotoSphere, read_panorama, read_photo_sphere
from panorama_vlm.sampling_panorama import rotated_pixels
from panorama_vlm.tests.test_reading import XMP, crop_values, encoded, photo_sphere
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo
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


@pytest.mark.parametrize("name", ["ok.jpg", "prefix_ns2.jpg", "xmp_after_idat.png", "imagemagick.png"])
def test_a_crop_lies_where_its_colours_say(name):
    panorama = read_panorama(INPUTS / name)
    assert panorama.covered == (0.25, 0.75, 0.25, 0.75)
    assert degrees_off(panorama) < 0.6


# Where it lies in a file

CROP = crop_values((1024, 512), (512, 256), 100, 200, PoseHeadingDegrees=123.5)
SPHERE = PhotoSphere(full=(512, 1024), crop=(256, 512), top=100, left=200, heading=123.5)


def exiftool(*arguments):
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is missing: apt-get install libimage-exiftool-perl")
    return subprocess.run(["exiftool", *map(str, arguments)], check=True, capture_output=True).stdout


def by_exiftool(path):
    (found,) = json.loads(exiftool("-json", "-n", "-XMP-GPano:all", path))
    size = [int(found[f"FullPano{side}Pixels"]) for side in ("Height", "Width")]
    crop = [int(found[f"CroppedAreaImage{side}Pixels"]) for side in ("Height", "Width")]
    corner = [int(found[f"CroppedArea{side}Pixels"]) for side in ("Top", "Left")]
    return PhotoSphere(tuple(size), tuple(crop), *corner, found.get("PoseHeadingDegrees"))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif", "jp2"])
def test_what_exiftool_writes_is_read_in_every_format(panoramas, tmp_path, ending):
    if ending == "avif" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"a.{ending}"
    panoramas[0].save(path)
    exiftool("-overwrite_original", *(f"-XMP-GPano:{key}={value}" for key, value in CROP.items()), path)
    with Image.open(path) as image:
        assert read_photo_sphere(image) == SPHERE == by_exiftool(path)
        np.asarray(image)  # it can still be decoded
        if ending != "jp2":
            assert read_photo_sphere(image) == SPHERE  # and then as well


def jpeg_with(image, *segments):
    """A JPEG with these segments of application data."""
    data = encoded(image, "JPEG")
    more = b"".join(b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
    return data[:2] + more + data[2:]


MAIN, EXTENSION = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"


def extended(packet, parts, note=True):
    """A main packet that names an extension, and the extension in parts, the last one first."""
    digest = hashlib.md5(packet).hexdigest().upper().encode()
    main = XMP.replace(
        "rdf:about=",
        f'xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="{digest.decode()}" rdf:about=',
    )
    step = -(-len(packet) // parts)
    heads = [EXTENSION + digest + struct.pack(">II", len(packet), start) for start in range(0, len(packet), step)]
    pieces = [head + packet[step * number : step * (number + 1)] for number, head in enumerate(heads)]
    return [MAIN + (main % ("", "")).encode(), *reversed(pieces)]


def stored():
    """The same data as they come in JPEGs."""
    packet = photo_sphere(**CROP)
    first, second = dict(list(CROP.items())[:4]), dict(list(CROP.items())[4:])
    return {
        "two packets": [MAIN + photo_sphere(**first), MAIN + photo_sphere(**second)],
        "after another": [MAIN + (XMP % ("", "")).encode(), MAIN + packet],
        "extended": extended(packet, 3),
        "UTF-16, little": [MAIN + packet.decode().encode("utf-16")],
        "UTF-16, big, without a mark": [MAIN + packet.decode().encode("utf-16-be")],
        "UTF-32": [MAIN + packet.decode().encode("utf-32")],
        "UTF-32, big, without a mark": [MAIN + packet.decode().encode("utf-32-be")],
        "UTF-8 with a mark": [MAIN + packet.decode().encode("utf-8-sig")],
        "another prefix": [MAIN + packet.replace(b"GPano", b"p")],
        "no last slash": [MAIN + packet.replace(b"panorama/", b"panorama")],
    }


@pytest.mark.parametrize("how", stored())
def test_photo_sphere_data_are_read_however_they_are_stored(panoramas, tmp_path, how):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_with(panoramas[0], *stored()[how]))
    with Image.open(path) as image:
        assert read_photo_sphere(image) == SPHERE
    if shutil.which("exiftool") and "UTF-32" not in how and how != "UTF-16, big, without a mark":
        assert by_exiftool(path) == SPHERE


def raw_profile(kind, content):
    """As ImageMagick writes it: the name, the length, and the bytes in hex, 36 a line."""
    lines = "\n".join(content.hex()[start : start + 72] for start in range(0, 2 * len(content), 72))
    return f"Raw profile type {kind}".encode() + b"\0", f"\n{kind}\n{len(content):8}\n{lines}\n".encode()


def png_chunks():
    """The same data as they come in PNGs."""
    packet, keyword = photo_sphere(**CROP), b"XML:com.adobe.xmp\0"
    xmp, xmp_text = raw_profile("xmp", packet)
    app1, app1_text = raw_profile("APP1", MAIN + packet)
    return {
        "XMP": (b"iTXt", keyword + b"\0\0\0\0" + packet),
        "XMP, compressed": (b"iTXt", keyword + b"\1\0\0\0" + zlib.compress(packet)),
        "ImageMagick's xmp": (b"zTXt", xmp + b"\0" + zlib.compress(xmp_text)),
        "ImageMagick's xmp, not compressed": (b"tEXt", xmp + xmp_text),
        "ImageMagick's APP1": (b"zTXt", app1 + b"\0" + zlib.compress(app1_text)),
    }


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("how", png_chunks())
def test_photo_sphere_data_of_a_png_are_read_before_and_after_the_pixels(panoramas, tmp_path, how, place):
    data, (kind, content) = encoded(panoramas[0]), png_chunks()[how]
    at = data.index(b"IDAT" if place == "before" else b"IEND") - 4
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path = tmp_path / "a.png"
    path.write_bytes(data[:at] + chunk + data[at:])
    with Image.open(path) as image:
        assert read_photo_sphere(image) == SPHERE
    assert read_panorama(path).covered == (100 / 512, 356 / 512, 200 / 1024, 712 / 1024)
    if shutil.which("exiftool"):
        assert by_exiftool(path) == SPHERE


def test_packets_that_contradict_each_other_are_told(panoramas):
    segments = [
        MAIN + photo_sphere(**CROP),
        MAIN + photo_sphere(**(CROP | {"CroppedAreaTopPixels": 50, "PoseHeadingDegrees": "123.50"})),
    ]
    with Image.open(io.BytesIO(jpeg_with(panoramas[0], *segments))) as image:
        with pytest.warns(UserWarning, match="CroppedAreaTopPixels is 100 and 50; the first is taken") as caught:
            assert read_photo_sphere(image) == SPHERE
    assert len(caught) == 1


def test_damaged_text_of_a_png_is_no_photo_sphere_data(panoramas):
    info = PngInfo()
    info.add_text("Raw profile type xmp", "\nxmp\n  12\nno hex")
    info.add_text("Raw profile type APP1", "")
    info.add(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no zlib")
    data = encoded(panoramas[0], pnginfo=info)
    with Image.open(io.BytesIO(data)) as image:
        assert read_photo_sphere(image) is None
    assert read_panorama(data).covered is None


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
        mask, shown = out["view_mask"][0], out["pixel_values"][0].mean((1, 2, 3))
        least = min(0.01, shown.max())
        assert (mask | (shown < least + 0.004)).all() and (~mask | (shown > least - 0.004)).all()
        masked += int((~mask).sum())
        panorama = read_panorama(data, yaw_offset=yaw, mirrored=roll > 0)
        assert panorama.covered is None and panorama.rotation is None
        assert (panorama.seen == (panorama.pixels[..., 0] > 191)).float().mean() > 0.995
    assert masked > 50


# Projections


def cylinder(width, height, horizon, left=0, columns=None):
    """A cylindrical image whose colours name its rays, [height, columns, 3]."""
    yaw = ((left + np.arange(columns or width) + 0.5) / width - 0.5) * 2 * math.pi
    up = (horizon - np.arange(height) - 0.5) * 2 * math.pi / width
    rays = np.stack(np.broadcast_arrays(np.sin(yaw)[None], up[:, None], np.cos(yaw)[None]), -1)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    return Image.fromarray(((rays + 1) * 127.5).round().astype(np.uint8))


def cylindrical(full, crop, top, left):
    return photo_sphere(**crop_values(full, crop, top, left, ProjectionType="cylindrical"))


def test_a_cylinder_lies_where_its_colours_say():
    panorama = read_panorama(INPUTS / "cylindrical.jpg")
    top, bottom, left, right = panorama.covered
    assert (top, bottom) == pytest.approx((0.25, 0.75), abs=1.01 / 64) and (left, right) == (0, 1)
    assert degrees_off(panorama) < 0.7
    top = math.ceil(top * 64)
    assert degrees_off(Panorama(panorama.pixels, (top / 64, (top + 1) / 64, 0, 1))) < 1.5  # it was 11


@pytest.mark.parametrize(("needed_width", "most"), [(math.inf, 0.45), (256, 0.6)])
def test_a_cropped_cylinder_whose_horizon_is_not_in_the_middle(needed_width, most):
    """360 x 512 pixels of a cylinder 1,024 around: pitch from 57 degrees down to -28."""
    image = cylinder(1024, 360, 256, left=200, columns=512)
    packet = cylindrical((1024, 1024), (512, 360), 256, 200)
    panorama = read_panorama(encoded(image, "JPEG", quality=100, subsampling=0, xmp=packet), needed_width)
    upper, lower = (0.5 - math.degrees(math.atan(rows * 2 * math.pi / 1024)) / 180 for rows in (256, -104))
    assert panorama.covered == pytest.approx((upper, lower, 200 / 1024, 712 / 1024), abs=2 / 256)
    assert degrees_off(panorama, inset=1) < most


def test_a_cylinder_of_which_no_place_is_known_is_a_whole_turn_with_a_warning():
    data = encoded(cylinder(256, 80, 40), "JPEG", quality=100, xmp=photo_sphere(ProjectionType="Cylindrical"))
    with pytest.warns(UserWarning, match="cylindrical, and not where its pixels lie: taken as a whole turn"):
        assert degrees_off(read_panorama(data)) < 0.7
    with pytest.raises(ValueError, match="strict_aspect=False"):
        read_panorama(data, strict_aspect=True)


@pytest.mark.parametrize("large", [1000, 2**23])
def test_a_cylinder_that_is_reduced_by_what_divides_no_side_lies_where_it_should(monkeypatch, large):
    for room in ("reading", "placing"):
        monkeypatch.setattr(f"panorama_vlm.{room}_panorama.LARGE", large)
    for full, columns, height, horizon, left in ((1021, 1021, 403, 201.5, 0), (1023, 487, 301, 101, 211)):
        image = cylinder(full, height, horizon, left, columns)
        packet = cylindrical((full, full), (columns, height), round(full / 2 - horizon), left)
        panorama = read_panorama(encoded(image, "JPEG", quality=100, subsampling=0, xmp=packet), 200)
        assert (len(panorama.pixels) < 256) == (large == 1000)
        assert degrees_off(panorama, inset=1) < 0.6
        if columns == full:
            said = read_panorama(encoded(image, "JPEG", quality=100, subsampling=0), 200, projection="cylindrical")
            np.testing.assert_array_equal(said.pixels, panorama.pixels)


def test_what_the_user_says_goes_before_what_the_file_says(panoramas):
    """A wrong ProjectionType; where the image lies is still read."""
    values = crop_values((1024, 512), panoramas[0].size, 100, 200, PoseHeadingDegrees=90)
    wrong = encoded(panoramas[0], "JPEG", xmp=photo_sphere(**values | {"ProjectionType": "cylindrical"}))
    right = encoded(panoramas[0], "JPEG", xmp=photo_sphere(**values))
    found = read_panorama(wrong, projection="equirectangular", align_heading=True)
    expected = read_panorama(right, align_heading=True)
    assert found.covered == expected.covered and (found.pixels == expected.pixels).all()


def test_other_projections_are_refused_by_name(panoramas, tmp_path):
    path = tmp_path / "fish.jpg"
    path.write_bytes(encoded(panoramas[0], "JPEG", xmp=photo_sphere(ProjectionType="fisheye")))
    with pytest.raises(ValueError, match=r"cannot read .*fish\.jpg: .*'fisheye', read are equirectangular and cylindr"):
        read_panorama(path)
    assert read_panorama(path, projection="dual_fisheye:fov=190").covered is None


# Transparency, and layers of stitchers


def test_what_is_fully_transparent_is_not_seen():
    alpha = np.array(Image.open(INPUTS / "alpha.png"))[..., 3]
    panorama = read_panorama(INPUTS / "alpha.png")
    np.testing.assert_array_equal(panorama.seen, alpha > 0)
    shown, there = rays_of(panorama.pixels.numpy()), View("erp").rays((64, 128))
    apart = np.degrees(np.arccos(np.clip((shown * there).sum(-1), -1, 1)))
    assert apart[alpha > 0].max() < 1
    assert (np.abs(panorama.pixels.numpy()[alpha == 0] - 127.5) <= 0.5).all()
    turned = read_panorama(INPUTS / "alpha.png", yaw_offset=90, mirrored=True)
    np.testing.assert_array_equal(turned.seen, np.roll(alpha > 0, -32, axis=1)[:, ::-1])


def see_through(mode):
    """The same picture with the same pixels transparent, as files of this kind say it, and which are seen."""
    rng = np.random.default_rng(0)
    seen = np.repeat(np.repeat(rng.random((16, 32)) < 0.5, 8, 0), 8, 1)  # [128, 256], blocks of 8
    grey = np.where(seen, rng.integers(1, 256, seen.shape), 0).astype(np.uint8)
    alpha = Image.fromarray(np.where(seen, 255, 0).astype(np.uint8))
    if mode in ("LA", "RGBA"):
        image = Image.fromarray(grey).convert(mode)
        image.putalpha(alpha)
        return encoded(image), seen
    image = Image.fromarray(grey)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
        return encoded(image, transparency=0), seen
    return encoded(image.convert(mode), transparency=0 if mode == "L" else (0, 0, 0)), seen


@pytest.mark.parametrize("large", [1000, 2**23])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_is_seen_however_a_file_says_it_and_when_it_is_reduced(monkeypatch, mode, large):
    for room in ("reading", "placing"):
        monkeypatch.setattr(f"panorama_vlm.{room}_panorama.LARGE", large)
    data, seen = see_through(mode)
    panorama = read_panorama(data, 64)
    k = 4 if large == 1000 else 1
    np.testing.assert_array_equal(panorama.seen, seen[::k, ::k])
    assert (np.abs(panorama.pixels.numpy()[~seen[::k, ::k]] - 127.5) <= 0.5).all()


def test_transparent_parts_of_other_projections_are_not_seen():
    """The lower half of six faces; up to where bilinear sampling mixes, half a pixel of a face."""
    faces = np.full((64, 384, 4), 255, np.uint8)
    faces[32:, : 4 * 64, 3] = 0  # of right, left, up and down
    panorama = read_panorama(faces, projection="cubemap_6x1")
    rays = View("erp").rays(tuple(panorama.seen.shape))
    right = (np.abs(rays[..., 0]) > np.abs(rays[..., 1:]).max(-1) * 1.05) & (np.abs(rays[..., 1]) > 0.05)
    np.testing.assert_array_equal(panorama.seen.numpy()[right], rays[..., 1][right] > 0)
    front = np.abs(rays[..., 2]) > np.abs(rays[..., :2]).max(-1) * 1.05
    assert panorama.seen[torch.from_numpy(front)].all()


@pytest.mark.parametrize("tilt", [(0.0, 0.0), (30.0, -70.0)])
@pytest.mark.parametrize("min_seen", [0.0, 0.01, 0.25])
def test_views_of_a_mask_of_any_shape_are_left_out_where_they_see_too_little(tilt, min_seen):
    """Brute force: white where there is something, black elsewhere; the white share of each view is its mean."""
    rays = View("erp").rays((256, 512))
    generator = np.random.default_rng(1)
    options = {"image_size": 96, "view_strategy": "anyres_e2p", "fov_deg": 60.0, "pitch_rows": [-60, 0, 60]}
    processor = PanoramaImageProcessor(**options, image_mean=(0, 0, 0), image_std=(1, 1, 1), min_seen=min_seen)
    masked = 0
    for _ in range(4):  # caps around any direction, with a hole
        middle = generator.normal(size=3)
        near = rays @ (middle / np.linalg.norm(middle))
        seen = (near > math.cos(math.radians(generator.uniform(15, 60)))) & (near < 0.99)
        rgba = np.dstack([np.full((256, 512, 3), 255, np.uint8), np.where(seen, 255, 0).astype(np.uint8)])
        out = processor(Image.fromarray(rgba), tilts=[tilt], return_tensors="pt")
        mask, shown = out["view_mask"][0], out["pixel_values"][0].mean((1, 2, 3))
        least = min(min_seen, float(shown.max()))
        assert (mask | (shown < least + 0.01)).all()
        assert (~mask | (shown > least - 0.01)).all() and mask.any()
        masked += int((~mask).sum())
    assert masked > 8
    with pytest.raises(ValueError, match=r"min_seen must be in \[0, 1\), got 1.5"):
        processor(Image.fromarray(rgba), min_seen=1.5)


def test_transparency_within_a_crop_lies_where_the_crop_does(panoramas):
    part = panoramas[0].crop((0, 0, 120, 128)).convert("RGBA")
    alpha = Image.new("L", part.size, 255)
    alpha.paste(0, (0, 0, 60, 128))
    part.putalpha(alpha)
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", photo_sphere(**crop_values((512, 256), part.size, 64, 196)).decode())
    for needed_width in (math.inf, 128):
        panorama = read_panorama(encoded(part, pnginfo=info), needed_width)
        wanted = np.zeros((256, 512), bool)
        wanted[64:192, 256:316] = True
        k = 256 // len(panorama.pixels)
        np.testing.assert_array_equal(panorama.seen, wanted[::k, ::k])
        assert panorama.covered == (0.25, 0.75, 196 / 512, 316 / 512)


def layer(full=(1024, 512), position=(200, 100), resolution=150.0, **more):
    """The tags that nona writes into a cropped layer."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[282] = tags[283] = resolution
    tags[286], tags[287] = (place / resolution for place in position)
    if full is not None:
        tags[33300], tags[33301] = full
    for tag, value in more.items():
        tags[int(tag[1:])] = value
    return tags


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_cropped_layer_of_a_stitcher_lies_where_its_tags_say(panoramas, tmp_path, mode):
    panoramas[0].convert(mode).save(tmp_path / "layer.tif", tiffinfo=layer())
    panorama = read_panorama(tmp_path / "layer.tif")
    assert panorama.covered == (100 / 512, 356 / 512, 200 / 1024, 712 / 1024)
    np.testing.assert_array_equal(panorama.pixels[100:356, 200:712], np.array(panoramas[0]))


@pytest.mark.tools
def test_another_reader_finds_the_layer_at_the_same_place(panoramas, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    panoramas[0].save(tmp_path / "layer.tif", tiffinfo=layer())
    with tifffile.TiffFile(tmp_path / "layer.tif") as file:
        tags = {tag.name: tag.value for tag in file.pages[0].tags}
    place = [tags[f"{axis}Position"][0] / tags[f"{axis}Position"][1] for axis in "XY"]
    place = [round(at * tags["XResolution"][0] / tags["XResolution"][1]) for at in place]
    full = tags["ImageFullWidth"], tags["ImageFullLength"]
    assert (full, place) == ((1024, 512), [200, 100])


def test_tags_of_a_tiff_that_say_too_little_or_too_much_are_told(panoramas):
    def read(**options):
        return read_photo_sphere(Image.open(io.BytesIO(encoded(panoramas[0], "TIFF", **options))))

    assert read() is None
    assert read(tiffinfo=layer((512, 256), (0, 0))) is None
    with pytest.warns(UserWarning, match="lies at 200, 100 of a larger image.*how large a one: ignored"):
        assert read(tiffinfo=layer(None)) is None
    packet = photo_sphere(**crop_values((1024, 512), (512, 256), 90, 200))
    with pytest.warns(UserWarning, match="contradict each other about where it lies; the Photo Sphere data are taken"):
        assert read(tiffinfo=layer(t700=packet)).top == 90
    with pytest.warns(UserWarning, match="do not fit"):
        read_panorama(encoded(panoramas[0], "TIFF", tiffinfo=layer((600, 200))))
