"""Places in the forms of viewers, maps, data sets and pictures, each by the rules of that form itself."""

import html.parser
import json
import math
import re
import warnings

import numpy as np
import pytest
from panorama_vlm.exports_panorama import (
    crop_place,
    draw_places,
    file_stem,
    to_coco,
    to_geojson,
    to_pannellum,
    to_photo_sphere_viewer,
    view_around,
    whole_sphere,
)
from panorama_vlm.geometry_panorama import View
from panorama_vlm.places_panorama import BFoV, NamedPlace, in_bfov, read_places
from panorama_vlm.reading_panorama import Layout, layout_of
from panorama_vlm.tests.test_reading import crop_values, encoded, photo_sphere
from PIL import ExifTags, Image, TiffImagePlugin
from scipy.spatial.transform import Rotation

WHOLE = Layout(1024, 512, (512, 1024))
HOSTILE = "</script><img src=x onerror=alert(1)> & \"a\" 'b'\n{{7*7}} ../../etc/passwd \u2028\u202e\x00"

# A file of 400 x 200 pixels of a sphere of 800 x 400: what Photo Sphere data say of it.
POSES = [
    {},
    {"PoseHeadingDegrees": 200.0},
    {"PoseHeadingDegrees": 310.0, "PosePitchDegrees": 12.0, "PoseRollDegrees": -8.0},
    {"PosePitchDegrees": -20.0, "PoseRollDegrees": 15.0},
]
CROPS = [(800, 400, 0, 0), (400, 200, 60, 250), (400, 200, 150, 380)]


def spotted(crop, pose):
    """A file with a white spot, as bytes, and the pixel of the spot."""
    width, height, top, left = crop
    pixels = np.zeros((height, width, 3), np.uint8)
    column, row = width // 3, height // 2 - 17
    pixels[row - 2 : row + 3, column - 2 : column + 3] = 255
    values = crop_values((800, 400), (width, height), top, left, **pose)
    return encoded(Image.fromarray(pixels), "JPEG", xmp=photo_sphere(**values), quality=95), (column + 0.5, row + 0.5)


def place_of_spot(file, **options):
    """Where the spot is once the panorama is read: what a model that sees well says."""
    grey = np.asarray(whole_sphere(file, 1600, fill=(0, 0, 0), **options).convert("L"), float)
    grey[grey < 60] = 0
    rays = View("erp").rays(grey.shape)
    x, y, z = (rays * (grey * np.cos(np.arcsin(rays[..., 1])))[..., None]).sum((0, 1))
    return BFoV(math.degrees(math.atan2(x, z)), math.degrees(math.atan2(y, math.hypot(x, z))), 4, 4)


def pixel_in_pannellum(config, spot):
    """Which pixel of the file Pannellum 2.5.7 shows at a hotspot: `Renderer.render` (the pose) and the shader
    `fragEquirectangular` of its libpannellum.js."""
    pitch, yaw = math.radians(spot["pitch"]), math.radians(spot["yaw"])
    horizon_pitch, horizon_roll = (math.radians(config[name]) for name in ("horizonPitch", "horizonRoll"))
    sin, cos = math.sin, math.cos
    x = cos(horizon_roll) * sin(pitch) * sin(horizon_pitch) + cos(pitch) * (
        cos(horizon_pitch) * cos(yaw) + sin(horizon_roll) * sin(horizon_pitch) * sin(yaw)
    )
    y = -sin(pitch) * sin(horizon_roll) + cos(pitch) * cos(horizon_roll) * sin(yaw)
    z = cos(horizon_roll) * cos(horizon_pitch) * sin(pitch) + cos(pitch) * (
        -cos(yaw) * sin(horizon_pitch) + cos(horizon_pitch) * sin(horizon_roll) * sin(yaw)
    )
    across, up = math.atan2(y, x) / math.pi, math.asin(z) / (math.pi / 2)
    u_h, u_v = config["haov"] / 360, config["vaov"] / 180
    u_vo = math.radians(config["vOffset"]) / math.pi * 2
    return (across + u_h) / (u_h * 2), (-up + u_v + u_vo) / (u_v * 2)


def spot_in_photo_sphere_viewer(data, column, row):
    """Yaw and pitch that Photo Sphere Viewer 5.15 gives a pixel of the file: `textureCoordsToSphericalCoords` of its
    equirectangular adapter, and the pose of its mesh (three.js: intrinsic Y, X, Z)."""
    x = (column + data["croppedX"]) / data["fullWidth"] * math.pi * 2
    pitch = math.pi / 2 - (row + data["croppedY"]) / data["fullHeight"] * math.pi
    yaw = x - math.pi if x >= math.pi else x + math.pi
    vector = [-math.cos(pitch) * math.sin(yaw), math.sin(pitch), math.cos(pitch) * math.cos(yaw)]
    pose = [-data["poseHeading"], -data["posePitch"], data["poseRoll"]]
    x, y, z = Rotation.from_euler("YXZ", pose, degrees=True).apply(vector)
    theta = math.atan2(x, z)
    return math.degrees(-theta if theta < 0 else 2 * math.pi - theta), 90 - math.degrees(math.acos(y))


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("pose", POSES)
def test_viewers_show_the_thing_at_its_hotspot(crop, pose):
    file, (column, row) = spotted(crop, pose)
    layout = layout_of(file)
    place = place_of_spot(file)
    config = to_pannellum([place], layout, "a.jpg")
    (spot,) = config["hotSpots"]
    found = pixel_in_pannellum(config, spot)
    assert found == pytest.approx((column / crop[0], row / crop[1]), abs=1.5 / crop[0])
    assert -180 <= spot["yaw"] < 180 and -90 <= spot["pitch"] <= 90

    viewer = to_photo_sphere_viewer([place], layout, "a.jpg")
    position = viewer["markers"][0]["position"]
    yaw, pitch = spot_in_photo_sphere_viewer(viewer["panoData"], column, row)
    assert (float(position["yaw"][:-3]) - yaw + 180) % 360 - 180 == pytest.approx(0, abs=0.7)
    assert float(position["pitch"][:-3]) == pytest.approx(pitch, abs=0.7)
    if "PoseHeadingDegrees" in pose:  # its north is where the compass of both says
        assert yaw % 360 == pytest.approx(layout.bearing(place.yaw), abs=0.7)
        assert (config["northOffset"] + spot["yaw"]) % 360 == pytest.approx(layout.bearing(place.yaw), abs=0.1)
        assert 0 <= config["northOffset"] < 360 and config["compass"]
    else:
        assert "northOffset" not in config and layout.bearing(0) is None


@pytest.mark.parametrize("crop", CROPS)
def test_neither_the_front_nor_levelling_changes_what_a_viewer_shows(crop):
    """Of the processor's options: a panorama aligned to north, and one that is not levelled."""
    file, (column, row) = spotted(crop, POSES[2])
    for options in ({"align_heading": True}, {"level": False}, {"align_heading": True, "level": False}):
        layout = layout_of(file, **options)
        config = to_pannellum([place_of_spot(file, **options)], layout)
        found = pixel_in_pannellum(config, config["hotSpots"][0])
        assert found == pytest.approx((column / crop[0], row / crop[1]), abs=1.5 / crop[0])
        if options.get("align_heading"):
            assert layout.bearing(0.0) == 0


@pytest.mark.parametrize("number", [0.00001, -0.00001, 179.99999, -180.0])
def test_angles_are_what_photo_sphere_viewer_can_read(number):
    position = to_photo_sphere_viewer([BFoV(number, 0.00001, 4, 4)], WHOLE)["markers"][0]["position"]
    for text in position.values():  # `parseAngle` of its utils
        match = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]*)?)(.*)", text.lower().strip())
        assert match and match[2] == "deg"


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_a_hostile_label_is_text_everywhere(tmp_path):
    place = NamedPlace(HOSTILE, BFoV(10, 5, 20, 10))
    text = to_pannellum([place], WHOLE)["hotSpots"][0]["text"]
    marker = to_photo_sphere_viewer([place], WHOLE)["markers"][0]
    for shown in (text, marker["tooltip"]):  # each goes to innerHTML
        parsed = Tags(shown)
        assert parsed.tags == [] and parsed.text == HOSTILE
    assert marker["data"]["label"] == HOSTILE and re.fullmatch(r"[\w-]+", marker["id"])
    (feature,) = to_geojson([place], WHOLE, position=(1, 2), heading=3)["features"]
    assert json.loads(json.dumps(feature))["properties"]["label"] == HOSTILE
    name = file_stem(HOSTILE)
    assert re.fullmatch(r"[\w-]{1,60}", name) and (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert file_stem("../..") == file_stem("") == "place"
    picture = draw_places(Image.new("RGB", (512, 256)), [place, NamedPlace("猫 кот", place.place)])
    assert picture.getbbox() is not None


# Maps


def gps(latitude, longitude):
    """EXIF as cameras write it."""
    exif = Image.Exif()
    exif[ExifTags.IFD.GPSInfo] = {
        1: "S" if latitude < 0 else "N",
        2: _sexagesimal(latitude),
        3: "W" if longitude < 0 else "E",
        4: _sexagesimal(longitude),
    }
    return exif


def _sexagesimal(value):
    degrees, rest = divmod(abs(value) * 3600, 3600)
    minutes, seconds = divmod(rest, 60)
    return float(degrees), float(minutes), float(seconds)


@pytest.mark.parametrize("position", [(52.5163, 13.3777), (-33.8568, 151.2153), (40.6892, -74.0445)])
def test_position_and_heading_of_the_file_make_bearings(position):
    xmp = photo_sphere(**crop_values((400, 200), (400, 200), 0, 0, PoseHeadingDegrees=350.0))
    file = encoded(Image.new("RGB", (400, 200), "white"), "JPEG", xmp=xmp, exif=gps(*position))
    layout = layout_of(file)
    assert layout.position == pytest.approx(position, abs=1e-6)
    found = to_geojson([NamedPlace("door", BFoV(30, -5, 20, 10), 0.5), BFoV(0, 0, 360, 20)], layout, "a.jpg")
    assert set(found) == {"type", "features"} and found["type"] == "FeatureCollection"
    first, around = found["features"]
    assert set(first) == {"type", "geometry", "properties"} and first["type"] == "Feature"
    assert first["geometry"]["coordinates"] == pytest.approx(position[::-1], abs=1e-6)  # longitude comes first
    facts = first["properties"]
    assert (facts["bearing"], facts["bearing_from"], facts["bearing_to"]) == (20, 10, 30)
    assert (facts["label"], facts["score"], facts["bfov"], facts["panorama"]) == (
        "door",
        0.5,
        [30, -5, 20, 10],
        "a.jpg",
    )
    assert around["properties"]["bearing"] is None and around["geometry"]["type"] == "Point"


@pytest.mark.parametrize("position", [(0.0, 0.0), (52.5, 13.4), (-33.9, 179.9999), (64.0, -179.9999)])
@pytest.mark.parametrize("yaw", [0.0, 77.0, -90.0, 135.0])
def test_a_line_goes_along_the_bearing_as_far_as_is_said(position, yaw):
    """Against rotations of unit vectors, in float64."""
    (feature,) = to_geojson([BFoV(yaw, 0, 4, 4)], WHOLE, position=position, heading=10.0, reach=2000.0)["features"]
    shape = feature["geometry"]
    lines = shape["coordinates"] if shape["type"] == "MultiLineString" else [shape["coordinates"]]
    assert all(-180 <= x <= 180 and -90 <= y <= 90 for line in lines for x, y in line)
    if len(lines) == 2:  # RFC 7946, 3.1.9
        assert abs(lines[0][1][0]) == 180 and lines[0][1][0] == -lines[1][0][0] and lines[0][1][1] == lines[1][0][1]
    east, north = (math.radians(value) for value in position[::-1])
    up = np.array([math.cos(north) * math.cos(east), math.cos(north) * math.sin(east), math.sin(north)])
    to_north = np.array([-math.sin(north) * math.cos(east), -math.sin(north) * math.sin(east), math.cos(north)])
    ahead = Rotation.from_rotvec(-math.radians(10 + yaw) * up).apply(to_north)
    angle = 2000 / 6_371_008.8
    end = math.cos(angle) * up + math.sin(angle) * ahead
    wanted = math.degrees(math.atan2(end[1], end[0])), math.degrees(math.asin(end[2]))
    assert lines[-1][-1] == pytest.approx(wanted, abs=2e-7)


def test_what_is_not_known_is_asked_for():
    with pytest.raises(ValueError, match="no position and heading"):
        to_geojson([], WHOLE)
    with pytest.raises(ValueError, match="no position: hand it over"):
        to_geojson([], WHOLE, heading=1.0)
    with pytest.raises(ValueError, match="latitude, longitude"):
        to_geojson([], WHOLE, heading=1.0, position=(151.2, -33.9))


@pytest.mark.parametrize("value", [(TiffImagePlugin.IFDRational(0, 0),) * 3, (91.0, 0.0, 0.0)])
def test_a_position_that_cannot_be_is_none_and_said(value):
    """Cameras without a fix write 0/0."""
    exif = Image.Exif()
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: value, 3: "E", 4: (1.0, 2.0, 3.0)}
    file = encoded(Image.new("RGB", (400, 200), "white"), "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="GPS position of image in bytes cannot be read"):
        assert layout_of(file).position is None


# Data sets


def test_coco_reads_the_boxes_and_their_masks_are_the_places(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    crop = Layout(400, 200, (400, 800), top=60, left=250)
    places = [
        NamedPlace("cat", BFoV(10, 5, 30, 20), 0.75),
        NamedPlace("cat", BFoV(-175, -30, 40, 30)),  # across the seam
        NamedPlace("<b>", BFoV(0, 80, 360, 20)),  # around the pole
        BFoV(-40, 12, 6, 4),
    ]
    written = to_coco([("a.jpg", WHOLE, places), ("b.jpg", crop, [BFoV(-60, 30, 60, 50)])])
    (tmp_path / "places.json").write_text(json.dumps(written))
    data = coco.COCO(str(tmp_path / "places.json"))
    assert [image["file_name"] for image in data.loadImgs([1, 2])] == ["a.jpg", "b.jpg"]
    assert [each["name"] for each in data.loadCats(data.getCatIds())] == ["cat", "<b>", "place"]
    found = data.loadAnns(data.getAnnIds())
    assert len(found) == 5 and len({each["id"] for each in found}) == 5
    assert [each.get("score") for each in found] == [0.75, None, None, None, None]
    for each in found:
        image = data.imgs[each["image_id"]]
        layout = {1: WHOLE, 2: crop}[each["image_id"]]
        x, y, width, height = each["bbox"]
        assert 0 <= x < x + width <= image["width"] and 0 <= y < y + height <= image["height"]
        rows, columns = np.mgrid[: image["height"], : image["width"]] + 0.5
        yaw = ((columns + layout.left) / layout.full[1] - 0.5) * 360
        pitch = (0.5 - (rows + layout.top) / layout.full[0]) * 180
        wanted = in_bfov(BFoV(*each["bfov"]), yaw, pitch)
        mask = data.annToMask(each).astype(bool)
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.93
        assert each["area"] == pytest.approx(wanted.sum(), rel=0.05)
        there = np.nonzero(wanted)
        assert [x, y] == pytest.approx([there[1].min(), there[0].min()], abs=1.5)
        assert [x + width, y + height] == pytest.approx([there[1].max() + 1, there[0].max() + 1], abs=1.5)
    assert [len(each["segmentation"]) for each in found] == [1, 2, 1, 1, 1]


def test_files_in_which_places_are_no_boxes_are_refused_by_name():
    tilted = layout_of(spotted(*(CROPS[0], POSES[2]))[0])
    with pytest.raises(ValueError, match=r"the camera of a\.jpg was not level \(pitch 12, roll -8\).*whole_sphere"):
        to_coco([("a.jpg", tilted, [])])
    cube = layout_of(Image.new("RGB", (300, 200)), projection="cubemap_3x2")
    for export in (to_pannellum, to_photo_sphere_viewer, lambda places, layout: to_coco([("a", layout, places)])):
        with pytest.raises(ValueError, match="cubemap_3x2"):
            export([], cube)


def test_what_a_file_does_not_show_is_left_out_with_a_word():
    layout = Layout(400, 200, (400, 800), top=60, left=250)
    places = [BFoV(0, 30, 10, 10), BFoV(170, 0, 10, 10), BFoV(0, -60, 10, 10)]
    for export in (to_pannellum, to_photo_sphere_viewer):
        with pytest.warns(UserWarning, match="2 of 3 places lie where the file shows nothing"):
            kept = export(places, layout)
        assert len(kept.get("hotSpots") or kept["markers"]) == 1
    with pytest.warns(UserWarning, match="2 of 3"):
        assert len(to_coco([("a.jpg", layout, places)])["annotations"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_pannellum(places[:1], layout)


@pytest.mark.parametrize("size", [(400, 100), (200, 200)])
def test_without_photo_sphere_data_the_size_says_what_is_shown(size):
    layout = layout_of(Image.new("RGB", size))
    config = to_pannellum([BFoV(0, 0, 5, 5)], layout)
    assert (config["haov"], config["vaov"]) == ((360, 90) if size == (400, 100) else (180, 180))
    for array in (np.zeros((size[1], size[0], 3), np.uint8), np.zeros((3, size[1], size[0]), np.uint8)):
        assert layout_of(array) == layout


# Pictures


@pytest.mark.parametrize(
    "place", [BFoV(10, 5, 30, 20), BFoV(-178, -40, 40, 30), BFoV(60, 70, 50, 20), BFoV(0, 0, 4, 60)]
)
def test_a_view_around_a_place_just_shows_all_of_it(place):
    view = view_around(place, margin=1.0)
    yaw, pitch = np.meshgrid(np.arange(-180, 180, 0.5), np.arange(-89.75, 90, 0.5))
    inside = in_bfov(place, yaw, pitch)
    yaw, pitch = np.radians(yaw[inside]), np.radians(pitch[inside])
    rays = np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], -1)
    row, column, seen = view.cells(rays, (200, 200), margin=0.51)
    assert seen.all()
    reach = np.abs(np.stack([row, column]) - 99.5).max()
    assert 97 < reach <= 100.1  # and nothing beyond it, on the longer side


@pytest.mark.parametrize("place", [BFoV(0, 0, 360, 40), BFoV(0, 88, 20, 180), BFoV(0, 0, 170, 10)])
def test_of_a_place_too_wide_for_a_view_the_middle_is_shown(place):
    assert view_around(place).fov == 120 and view_around(BFoV(0, 0, 1, 1), narrowest=30).fov == 30


def test_a_crop_shows_the_thing_across_the_seam_too():
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[118:138, :10], pixels[118:138, -10:] = (255, 0, 0), (0, 0, 255)
    crop = np.asarray(crop_place(Image.fromarray(pixels), BFoV(180, 0, 14, 14), size=64, margin=1.0)).astype(int)
    assert crop.shape == (64, 64, 3)
    assert crop[4:-4, 4:28, 2].min() > 200 and crop[4:-4, 36:-4, 0].min() > 200  # the left of it is the right edge


def test_a_drawing_is_of_the_whole_level_sphere():
    file, _ = spotted(CROPS[1], POSES[2])
    place = place_of_spot(file)
    picture = whole_sphere(file, 512, fill=(0, 0, 0))
    drawn = np.asarray(draw_places(picture, [NamedPlace("", place._replace(x_fov=12, y_fov=12))])).astype(int)
    assert drawn.shape == (256, 512, 3)
    red = np.argwhere((drawn[..., 0] > 200) & (drawn[..., 1] < 80))
    spot = np.argwhere(drawn.min(-1) > 200)
    assert red.mean(0) == pytest.approx(spot.mean(0), abs=2)


def test_what_an_answer_says_of_how_sure_it_is_is_its_score():
    text = '[{"label": "cat", "bfov": [1, 2, 3, 4], "score": 0.25}, {"bfov": [5, 6, 7, 8], "confidence": 1.0}]'
    assert [(each.label, each.score) for each in read_places(text)] == [("cat", 0.25), ("", 1.0)]
    assert [each.score for each in read_places('{"bfov": [1, 2, 3, 4], "score": 7}, [5, 6, 7, 8]')] == [None] * 2
