"""Images that say for each pixel of a panorama what it shows, as token labels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..places_panorama import bfov_of_mask
from ..reading_panorama import open_image, read_photo_sphere
from ..token_labels_panorama import LabelMaps
from .rows import BadSample

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


def read_label_maps(panorama: Any, classes: dict[str, tuple[Any, LabelColumn]], things: Any = None) -> LabelMaps:
    """The label maps of one panorama.

    Args:
        panorama: the image itself; it must show the whole sphere.
        classes: field -> file (path or bytes) and what it holds.
        things: file of the ids of single things, 0 where none is; their places follow from it.

    Raises:
        BadSample: for files that cannot be this, each named.
    """
    image = open_image(panorama)
    if isinstance(image, Image.Image):
        sphere = read_photo_sphere(image)
        partial = sphere is not None and sphere.crop is not None and sphere.crop != sphere.full
        if partial or image.width != 2 * image.height:
            raise BadSample(
                f"token labels: the panorama must show the whole sphere, and is {image.width} x {image.height}"
                f"{' with a cropped area' * partial}"
            )
    maps = {name: _class_map(name, file, column) for name, (file, column) in classes.items()}
    if things is None:
        return LabelMaps(maps)
    ids = _pixels("things", things)
    there = [int(value) for value in np.unique(ids) if value > 0]
    index = np.full(int(ids.max()) + 1, -1)
    index[there] = np.arange(len(there))
    return LabelMaps(maps, index[ids], tuple(bfov_of_mask(ids == value) for value in there))


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
