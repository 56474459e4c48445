"""Places out of the model: hotspots of viewers, bearings on a map, boxes of a detector's data set, pictures.

Everything starts from places as `places_panorama` has them and the :class:`Layout` of their panorama, which says how
its file lies on the sphere: viewers show the file, and each has its own zero of yaw. What a file does not show is left
out, with a warning. Labels come from a model and may hold anything: what a format takes for markup is escaped.
"""

from __future__ import annotations

import html
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .geometry_panorama import MAX_IMAGE_SIZE, View, ViewPlan, camera_rotation, yaw_rotation
from .options_panorama import check_number, check_text, check_whole
from .places_panorama import BFoV, NamedPlace, check_bfov, draw_bfov, wrap
from .reading_panorama import Layout, read_panorama
from .sampling_panorama import erp_to_views

EARTH_RADIUS = 6_371_008.8  # metres, the mean of WGS 84 (IUGG)
_FARTHEST = math.pi * EARTH_RADIUS
COLOURS = ("red", "lime", "dodgerblue", "yellow", "magenta", "cyan", "orange", "white")
WIDEST = 120.0  # degrees of a perspective view around a place: beyond it the edges are stretched fourfold
_WIDEST_PICTURE = 2**16  # pixels
_ON_AN_EDGE = 33  # directions along an edge of a place
_LONGEST = 60  # characters of a label in a picture or in the name of a file

Places = Sequence[NamedPlace] | Sequence[BFoV]


def named(places: Places) -> list[NamedPlace]:
    """Places with a name each, empty where they have none.

    Raises:
        ValueError: for what is no list of places, no place on the sphere (:func:`check_bfov`), a label that is no text,
            or a score that is no number.
    """
    if isinstance(places, str | bytes | BFoV | NamedPlace) or not isinstance(places, Sequence):
        raise ValueError(f"places must be a list of NamedPlace or BFoV, got {places!r}")
    found = [place if isinstance(place, NamedPlace) else NamedPlace("", place) for place in places]
    return [
        NamedPlace(
            check_text("the label of a place", each.label),
            check_bfov(each.place),
            None if each.score is None else check_number("the score of a place", each.score, 0.9, -math.inf),
        )
        for each in found
    ]


def shown(places: Places, layout: Layout) -> list[NamedPlace]:
    """The places whose middles a file shows; the others are left out with a warning."""
    kept = [each for each in named(places) if layout.sees(each.place.yaw, each.place.pitch)]
    if len(kept) < len(places):
        warnings.warn(
            f"{len(places) - len(kept)} of {len(places)} places lie where the file shows nothing", stacklevel=3
        )
    return kept


def _require_equirectangular(layout: Layout, what: str) -> None:
    if layout.projection != "equirectangular":
        raise ValueError(
            f"{what} needs an equirectangular file, got projection {layout.projection!r}: save whole_sphere(...) of "
            "it, and export for that"
        )


def _facts(each: NamedPlace) -> dict[str, Any]:
    """What is known of a place, as data: nothing of it is markup."""
    facts: dict[str, Any] = {"label": each.label, "bfov": [round(value, 4) for value in each.place]}
    return facts if each.score is None else {**facts, "score": each.score}


# Viewers


def to_pannellum(places: Places, layout: Layout, panorama: str = "") -> dict[str, Any]:
    """A configuration of Pannellum 2.5 (https://pannellum.org/documentation/reference/) with a hotspot a place.

    Its yaw is 0 in the middle of the *picture* and rises to the right, its pitch rises upwards, both in degrees: where
    a file shows a part of the sphere its middle is found, and `haov`, `vaov` and `vOffset` say how it lies. They, the
    horizon and `northOffset` go before what Pannellum reads from the file, of which it knows less. Texts are HTML
    there and escaped here (`escapeHTML` stays off; the standalone viewer, which turns it on, shows the escapes).

    Args:
        places: to show.
        layout: of their panorama.
        panorama: address of the file for the viewer.

    Raises:
        ValueError: for a file that is not equirectangular.
    """
    _require_equirectangular(layout, "Pannellum")
    check_text("panorama", panorama)
    full_height, full_width = layout.full
    middle = ((layout.left + layout.width / 2) / full_width - 0.5) * 360
    # It pitches the picture and then rolls it, about the picture's own front, where Photo Sphere data mean the opposite
    # order about the front of the sphere: turned = yaw * roll * pitch is solved for its three angles.
    turned = camera_rotation(layout.pitch, layout.roll) @ yaw_rotation(middle)
    roll = math.degrees(math.asin(max(-1.0, min(1.0, -turned[1, 0]))))
    pitch = math.degrees(math.atan2(turned[1, 2], turned[1, 1]))
    zero = math.degrees(math.atan2(-turned[2, 0], turned[0, 0]))  # where its yaw is 0, to the right of the sphere's
    below = (layout.top + layout.height / 2) / full_height - 0.5
    config: dict[str, Any] = {
        "type": "equirectangular",
        "panorama": panorama,
        "haov": round(layout.width / full_width * 360, 4),
        "vaov": round(layout.height / full_height * 180, 4),
        "vOffset": round(-180 * below, 4) + 0.0,
        "horizonPitch": round(pitch, 4) + 0.0,
        "horizonRoll": round(roll, 4) + 0.0,
        "escapeHTML": False,
    }
    if layout.heading is not None:
        config |= {"northOffset": round((layout.heading + zero) % 360, 4), "compass": True}
    config["hotSpots"] = [
        {
            "id": f"place-{number}",
            "type": "info",
            "yaw": round(wrap(each.place.yaw + layout.yaw_offset - zero), 4),
            "pitch": round(each.place.pitch, 4),
            "text": html.escape(each.label, quote=False),
        }
        for number, each in enumerate(shown(places, layout))
    ]
    return config


def to_photo_sphere_viewer(places: Places, layout: Layout, panorama: str = "") -> dict[str, Any]:
    """What Photo Sphere Viewer 5 (https://photo-sphere-viewer.js.org/) takes: `panorama` and `panoData` of its viewer,
    and `markers` of its markers plugin, one a place.

    Its yaw is 0 in the middle of the whole sphere, or in the north where `poseHeading` is known, and rises to the
    right; angles are texts with their unit (bare numbers are radians), without an exponent, which it cannot read.
    Tooltips are HTML there and escaped here; `data` holds label, place and score as they are.

    Args:
        places: to show.
        layout: of their panorama.
        panorama: address of the file for the viewer.

    Raises:
        ValueError: for a file that is not equirectangular.
    """
    _require_equirectangular(layout, "Photo Sphere Viewer")
    check_text("panorama", panorama)
    north = layout.heading or 0.0
    data = {
        "isEquirectangular": True,
        "fullWidth": layout.full[1],
        "fullHeight": layout.full[0],
        "croppedWidth": layout.width,
        "croppedHeight": layout.height,
        "croppedX": layout.left,
        "croppedY": layout.top,
        "poseHeading": north,
        "posePitch": layout.pitch,
        "poseRoll": layout.roll,
    }
    markers = []
    for number, each in enumerate(shown(places, layout)):
        yaw, pitch = wrap(each.place.yaw + layout.yaw_offset + north), each.place.pitch
        marker = {
            "id": f"place-{number}",
            "position": {"yaw": f"{yaw:.4f}deg", "pitch": f"{pitch:.4f}deg"},
            "circle": 12,
            "svgStyle": {"fill": "rgba(255, 0, 0, 0.5)", "stroke": "white", "strokeWidth": "2px"},
            "data": _facts(each),
        }
        markers.append(marker | ({"tooltip": html.escape(each.label)} if each.label else {}))
    return {"panorama": panorama, "panoData": data, "markers": markers}


# Maps


def to_geojson(
    places: Places,
    layout: Layout,
    panorama: str = "",
    *,
    position: tuple[float, float] | None = None,
    heading: float | None = None,
    reach: float | None = None,
) -> dict[str, Any]:
    """Where places lie on a map, as GeoJSON (RFC 7946): a feature each, at the camera, with its `bearing` in degrees
    clockwise from north. How far away a place is one panorama does not say.

    Args:
        places: to write.
        layout: of their panorama.
        panorama: its name.
        position: latitude and longitude of the camera in degrees, where the file does not say them.
        heading: compass direction of the front (yaw 0) in degrees, where the file does not say it.
        reach: metres that a line goes along the bearing, on a great circle; without it a feature is a point. It is cut
            at the antimeridian (RFC 7946, 3.1.9).

    Returns:
        A `FeatureCollection`. `bearing_from` and `bearing_to` are the left and right edges; all three are `None` for a
        place that goes all around, which stays a point.

    Raises:
        ValueError: where position or heading are not known or not possible.
    """
    check_text("panorama", panorama)
    position = layout.position if position is None else position
    front = layout.bearing(0.0) if heading is None else check_number("heading", heading, 90.0, -math.inf)
    if reach is not None and check_number("reach", reach, 50.0) > _FARTHEST:
        raise ValueError(
            f"reach must be at most {_FARTHEST:.0f}, half around the Earth, got {reach}. Typical value: 50.0"
        )
    if position is None or front is None:
        missing = " and ".join(word for word, value in (("position", position), ("heading", front)) if value is None)
        raise ValueError(f"GeoJSON needs the camera's position and heading; the file says no {missing}: hand it over")
    try:
        latitude, longitude = (check_number("a part of it", value, 0, -math.inf) for value in position)
        is_position = abs(latitude) <= 90 and abs(longitude) <= 180
    except (ValueError, TypeError):
        is_position = False
    if not is_position:
        raise ValueError(
            f"a position must be (latitude, longitude) in degrees, got {position!r}. Typical: (52.5, 13.4)"
        )
    features = []
    for each in shown(places, layout):
        place = each.place
        around = place.x_fov >= 360
        low, high = place.edges
        edges = (0.0, -place.x_fov / 2, place.x_fov / 2)
        angles = [None if around else round((front + place.yaw + edge) % 360, 2) % 360 for edge in edges]
        geometry = {"type": "Point", "coordinates": [round(longitude, 7), round(latitude, 7)]}
        if reach is not None and not around:
            geometry = _line(latitude, longitude, (front + place.yaw) % 360, reach)
        properties: dict[str, Any] = dict(zip(("bearing", "bearing_from", "bearing_to"), angles, strict=True))
        properties |= {"pitch": place.pitch, "pitch_from": low, "pitch_to": high, "panorama": panorama, **_facts(each)}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _line(latitude: float, longitude: float, bearing: float, metres: float) -> dict[str, Any]:
    """A line from a position along a bearing, on a sphere (the direct problem of great circles), in one part, or in two
    that meet at the antimeridian."""
    angle, turn, north = metres / EARTH_RADIUS, math.radians(bearing), math.radians(latitude)
    sine = math.sin(north) * math.cos(angle) + math.cos(north) * math.sin(angle) * math.cos(turn)
    end = math.degrees(math.asin(max(-1.0, min(1.0, sine))))
    east = math.degrees(
        math.atan2(math.sin(turn) * math.sin(angle) * math.cos(north), math.cos(angle) - math.sin(north) * sine)
    )
    far = longitude + east
    if abs(far) <= 180:
        return {"type": "LineString", "coordinates": _rounded([(longitude, latitude), (far, end)])}
    side = math.copysign(180.0, far)
    cut = latitude + (end - latitude) * (side - longitude) / east
    parts = [[(longitude, latitude), (side, cut)], [(-side, cut), (far - 2 * side, end)]]
    return {"type": "MultiLineString", "coordinates": [_rounded(part) for part in parts]}


def _rounded(points: Iterable[tuple[float, float]]) -> list[list[float]]:
    return [[round(value, 7) for value in point] for point in points]


# Data sets


def to_coco(panoramas: Iterable[tuple[str, Layout, Places]]) -> dict[str, Any]:
    """Places as COCO has objects (https://cocodataset.org/#format-data), in pixels of the files.

    A place across the seam has two polygons in `segmentation`, and as everywhere in COCO `bbox` encloses both; `area`
    is that of the polygons. Beside COCO's keys `bfov` is the place in degrees, and `score` stands where there is one.

    Args:
        panoramas: of each the name of its file, its layout and its places.

    Raises:
        ValueError: for a file in which the edges of a place are no lines of pixels: not equirectangular, or levelled on
            reading.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: dict[str, int] = {}
    for image_id, (file_name, layout, places) in enumerate(panoramas, 1):
        _require_equirectangular(layout, "COCO")
        if layout.pitch or layout.roll:
            raise ValueError(
                f"the camera of {file_name} was not level (pitch {layout.pitch:g}, roll {layout.roll:g}), so that "
                "places are no boxes in it: save whole_sphere(...) of it, and export for that"
            )
        images.append({"id": image_id, "file_name": file_name, "width": layout.width, "height": layout.height})
        for each in shown(places, layout):
            boxes = _boxes(each.place, layout)
            left, top = (min(box[side] for box in boxes) for side in (0, 1))
            right, bottom = (max(box[side] for box in boxes) for side in (2, 3))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": categories.setdefault(each.label or "place", len(categories) + 1),
                    "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
                    "area": round(sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes), 2),
                    "segmentation": [
                        [round(value, 2) for value in (x0, y0, x1, y0, x1, y1, x0, y1)] for x0, y0, x1, y1 in boxes
                    ],
                    "iscrowd": 0,
                    **{name: value for name, value in _facts(each).items() if name != "label"},
                }
            )
    listed = [{"id": number, "name": name} for name, number in categories.items()]
    return {"images": images, "annotations": annotations, "categories": listed}


def _boxes(place: BFoV, layout: Layout) -> list[tuple[float, float, float, float]]:
    """The parts of a place in a level file, as (left, top, right, bottom) in pixels: one, or two at its two edges."""
    full_height, full_width = layout.full
    low, high = place.edges
    top, bottom = ((0.5 - pitch / 180) * full_height - layout.top for pitch in (high, low))
    width = min(place.x_fov, 360.0) / 360 * full_width
    left = ((place.yaw + layout.yaw_offset) / 360 + 0.5) * full_width - width / 2 - layout.left
    if place.x_fov >= 360:
        left, width = 0.0, float(layout.width)
    top, bottom = max(0.0, top), min(float(layout.height), bottom)
    starts = sorted((left + turn * full_width) for turn in (-2, -1, 0, 1, 2))
    cut = [(max(0.0, start), min(float(layout.width), start + width)) for start in starts]
    return [(start, top, end, bottom) for start, end in cut if end > start]


# Pictures


def whole_sphere(panorama: Any, width: int | None = None, **options: Any) -> Image.Image:
    """A panorama as an equirectangular picture of the whole sphere, levelled: what places are places of.

    Args:
        panorama: see :func:`read_panorama`.
        width: of the picture in pixels, even, at most 65,536; that of what was read where it is not given.
        options: of :func:`read_panorama`.

    Raises:
        ValueError: for another width, and as :func:`read_panorama`.
    """
    if width is not None:
        width = check_whole("width", width, 2048, least=2)
        if width % 2 or width > _WIDEST_PICTURE:
            raise ValueError(f"width must be even and at most {_WIDEST_PICTURE}, got {width}. Typical value: 2048")
    pixels = read_panorama(panorama, width or math.inf, **options).pixels
    pixels = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.cpu().numpy())
    return picture if width is None else picture.resize((width, width // 2), Image.Resampling.LANCZOS)


def draw_places(picture: Image.Image, places: Places) -> Image.Image:
    """A copy of an equirectangular picture of the whole sphere (:func:`whole_sphere`) with places drawn in, each label
    in a colour of its own."""
    colours: dict[str, str] = {}
    for each in named(places):
        colour = colours.setdefault(each.label, COLOURS[len(colours) % len(COLOURS)])
        picture = draw_bfov(picture, each.place, colour, _one_line(each.label))
    return picture.convert("RGB")


def crop_place(picture: Image.Image, place: BFoV, size: int = 512, margin: float = 1.2) -> Image.Image:
    """A square perspective view cut around a place of an equirectangular picture of the whole sphere, by the same rays
    as the views that the model sees.

    Args:
        picture: :func:`whole_sphere`.
        place: in its middle.
        size: side in pixels, at most 8192.
        margin: how much more is shown than the place, from 1.

    Raises:
        ValueError: for another size or margin, and for what is no place on the sphere.
    """
    if check_whole("size", size, 512) > MAX_IMAGE_SIZE:
        raise ValueError(f"size must be at most {MAX_IMAGE_SIZE}, got {size}. Typical value: 512")
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    view = view_around(place, margin)
    (cut,) = erp_to_views(pixels, ViewPlan((view,)), int(size))  # [3, size, size]
    return Image.fromarray(cut.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def view_around(place: BFoV, margin: float = 1.2, narrowest: float = 1.0, widest: float = WIDEST) -> View:
    """The square perspective view in whose middle a place lies, and that shows all of it.

    Args:
        place: to look at.
        margin: how much wider than the place the view is, by the tangents of half their angles.
        narrowest, widest: the least and the most degrees of its field of view; of a larger place it shows the middle.

    Raises:
        ValueError: for what is no place on the sphere, or a number out of its range.
    """
    place, margin = check_bfov(place), check_number("margin", margin, 1.2, least=1)
    if not 0 < check_number("narrowest", narrowest, 1.0) <= check_number("widest", widest, WIDEST) < 180:
        raise ValueError(f"narrowest and widest must be in (0, 180) in this order, got {narrowest} and {widest}")
    low, high = place.edges
    half = min(place.x_fov, 360.0) / 2
    across, up = np.linspace(-half, half, _ON_AN_EDGE), np.linspace(low, high, _ON_AN_EDGE)
    yaw = place.yaw + np.concatenate([across, across, np.full_like(up, -half), np.full_like(up, half)])
    pitch = np.concatenate([np.full_like(across, low), np.full_like(across, high), up, up])
    yaw, pitch = np.radians(yaw), np.radians(pitch)
    rays = np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], -1)
    view = View("perspective", place.yaw, place.pitch, 90.0)
    x, y, z = (rays @ view.rotation).T  # in the camera's coordinates
    reach = np.inf if z.min() <= 1e-6 else float((np.maximum(np.abs(x), np.abs(y)) / z).max())
    fov = math.degrees(2 * math.atan(margin * reach))
    return View("perspective", place.yaw, place.pitch, min(max(fov, narrowest), widest))


def _one_line(label: str) -> str:
    """A label that is drawn: what is printable of it, in one line."""
    return "".join(sign if sign.isprintable() else " " for sign in label)[:_LONGEST]


def file_stem(label: str) -> str:
    """A label as the name of a file: letters, digits and hyphens alone, so that it names no other folder."""
    return re.sub(r"[^\w]+", "-", check_text("a label", label)).strip("-_")[:_LONGEST] or "place"
