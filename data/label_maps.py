"""Images that say for each pixel of a panorama what it shows, as token labels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..places_panorama import bfov_of_mask
from ..reading_panorama import open_image, read_photo_sphere
from ..token_labels_panorama import LabelMaps
from .rows import BadSample

_MOST_THINGS = 10_000
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


@dataclass
class LabelColumn:
    """A field of token labels.

    Args:
        column: of images that hold a class id for each pixel of the panorama: PNG (or another lossless file) of one
            channel or with a palette, twice as wide as high.
        classes: how many there are; ids are 0 to `classes` - 1.
        unknown: the id of pixels of which the class is not known.
    """

    column: str
    classes: int
    unknown: int = 255


def read_label_maps(
    panorama: Any,
    classes: dict[str, tuple[Any, LabelColumn]],
    things: Any = None,
    align_heading: bool = False,
    level: bool = True,
    projection: str | None = None,
) -> LabelMaps:
    """The label maps of one panorama.

    Args:
        panorama: the image itself; it must show the whole sphere, as its pixels lie in the file.
        classes: field -> file (path or bytes) and what it holds; nothing is known of a field without a file.
        things: file of the ids of single things, 0 where none is; their places follow from it.
        align_heading, level: whether the panorama is turned to the north and levelled by its Photo Sphere data.
        projection: what the panorama is said to be, see :class:`Projection`.

    Raises:
        BadSample: for files that cannot be this, each named.
    """
    _check_panorama(panorama, align_heading, level, projection)
    maps = {name: _class_map(name, file, column) for name, (file, column) in classes.items() if file is not None}
    if things is None:
        return LabelMaps(maps)
    values, which = np.unique(_pixels("things", things), return_inverse=True)
    if (count := int((values > 0).sum())) > _MOST_THINGS:
        raise BadSample(f"token labels: 'things' has {count} ids, at most {_MOST_THINGS} are allowed")
    index = np.where(values > 0, np.cumsum(values > 0) - 1, -1)[which].reshape(which.shape)
    return LabelMaps(maps, index, tuple(bfov_of_mask(index == number) for number in range(count)))


def _check_panorama(panorama: Any, align_heading: bool, level: bool, projection: str | None) -> None:
    """See that the pixels of a panorama lie as those of its maps do."""
    image = open_image(panorama)
    if not isinstance(image, Image.Image):
        return
    sphere = read_photo_sphere(image)
    shape = projection or ("equirectangular" if sphere is None else sphere.projection)
    problems = {
        f"is {image.width} x {image.height}": image.width != 2 * image.height,
        "shows a part of the sphere": sphere is not None and sphere.crop not in (None, sphere.full),
        "is rotated by its EXIF orientation": image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
        "is turned by its heading (align_heading)": align_heading and sphere is not None and bool(sphere.heading),
        "is not equirectangular": shape != "equirectangular",
        "is levelled (level)": level and sphere is not None and bool(sphere.pitch or sphere.roll),
    }
    if image is not panorama:
        image.close()
    if wrong := [words for words, holds in problems.items() if holds]:
        raise BadSample(
            f"token labels: the panorama must show the whole sphere as it lies in the file, and it {wrong[0]}"
        )


def _class_map(name: str, file: Any, column: LabelColumn) -> np.ndarray:
    ids = _pixels(name, file)
    unknown = ids == column.unknown
    if (wrong := ids[~unknown & ((ids < 0) | (ids >= column.classes))]).size:
        raise BadSample(
            f"token labels: {name!r} has the class {int(wrong[0])}, allowed are 0 to {column.classes - 1} and "
            f"{column.unknown} where it is not known"
        )
    return np.where(unknown, -1, ids)


def _pixels(name: str, file: Any) -> np.ndarray:
    """The ids in an image, int64 [H, W]."""
    if not isinstance(file, str | bytes):
        raise BadSample(f"token labels: {name!r} must be a path or bytes, got {type(file).__name__}")
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if image.format == "JPEG":
            raise BadSample(f"token labels: {name!r} is a JPEG, which changes ids; use PNG")
        if image.mode not in _MODES:
            raise BadSample(f"token labels: {name!r} has the mode {image.mode}, it must have one channel or a palette")
        if image.width != 2 * image.height:
            raise BadSample(
                f"token labels: {name!r} is {image.width} x {image.height}, it must be twice as wide as high"
            )
        return np.asarray(image).astype(np.int64)
