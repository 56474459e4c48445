"""Placing: the pixels of an image at their place on the whole sphere."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from .cylinder_panorama import unrolled
from .geometry_panorama import yaw_rotation
from .photo_sphere_panorama import PhotoSphere
from .projections_panorama import Projection, hint, looks_like, to_equirectangular
from .sampling_panorama import rotated_pixels

MAX_SIDE = 32_767  # pixels; what OpenCV's remap can address
LARGE = 2**23  # pixels of a file that is reduced while it is read, whatever its size is divisible by
STRIP = 64  # rows of an image that are converted at a time
_LEFT_RIGHT = np.diag([-1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Panorama:
    """Pixels of the whole sphere.

    Args:
        pixels: [H, W, 3], uint8, or float32 in [0, 1].
        covered: the part of it that the image covers, as shares of its rows and columns (top, bottom, left, right);
            the rest is filled. Right may pass 1: the part goes on at the left edge. `None` where it is all.
        seen: bool [h, w] on the whole sphere, of any resolution: what of this the camera saw. `None` where it is all.
        rotation: [3, 3], turns directions of what is shown into those of the pixels; `None` where they are the same.
    """

    pixels: torch.Tensor
    covered: tuple[float, float, float, float] | None = None
    seen: torch.Tensor | None = None
    rotation: np.ndarray | None = None


def block_means(pixels: torch.Tensor, k: int) -> torch.Tensor:
    """[H, W, 3] -> [ceil(H / k), ceil(W / k), 3]: means over k x k pixels, at the lower and right edge over what there
    is of them; uint8 is rounded."""
    if k == 1:
        return pixels
    reduced = []
    for strip in pixels.split(max(STRIP // k, 1) * k):
        planes = strip.permute(2, 0, 1)[None].float()
        means = F.avg_pool2d(planes, k, ceil_mode=True, count_include_pad=False)[0].permute(1, 2, 0)
        reduced.append((means.round() if pixels.dtype == torch.uint8 else means).to(pixels.dtype))
    return torch.cat(reduced)


def from_cylinder(
    pixels: torch.Tensor,
    seen: torch.Tensor | None,
    scale: int,
    size: tuple[int, int],
    sphere: PhotoSphere | None,
    strict_aspect: bool,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int, int, int]]:
    """A cylindrical image of `size` (height, width), reduced by `scale`, as the part of the equirectangular one that it
    covers, what of it is seen, and its place as :func:`area_of` has it. Without Photo Sphere data it is a turn."""
    height, width = size
    place = None if sphere is None else _place_on_a_cylinder(sphere, height, width)
    if sphere is not None and place is None:
        problem = f"the Photo Sphere data of {name} say that it is cylindrical, and not where its pixels lie"
        if strict_aspect:
            raise ValueError(
                f"{problem}; write GPano data into the file, or use strict_aspect=False to take it as a turn"
            )
        warnings.warn(f"{problem}: taken as a whole turn around the horizon", stacklevel=3)
    turn, left, horizon = place or (float(width), 0.0, height / 2)
    if height % scale or width % scale:  # the last pixels stand for less than the others
        even = (scale, size, (*size, 0, 0), (height // scale, width // scale), torch.zeros(1))
        pixels, seen = _laid(pixels, *even), _mask_by(lambda mask: _laid(mask, *even), seen)
    row, column = height / pixels.shape[0], width / pixels.shape[1]  # in pixels of the file
    columns = round(turn / column)
    if columns > MAX_SIDE:
        raise ValueError(f"cannot read {name}: the whole turn has {columns} columns, at most {MAX_SIDE} are allowed")
    cylinder = (horizon / row, turn / row, columns // 2)
    rows, top = unrolled(pixels, *cylinder)
    seen = _mask_by(lambda mask: unrolled(mask, *cylinder)[0], seen)
    return rows, seen, (columns // 2, columns, top, round(left / column))


def _place_on_a_cylinder(sphere: PhotoSphere, height: int, width: int) -> tuple[float, float, float] | None:
    """Length of the whole turn, where the image begins in it, and its row at the horizon, in pixels of the image;
    `None` where Photo Sphere data do not say them."""
    full, crop = sphere.full or (0, 0), sphere.crop or sphere.full or (0, 0)
    if min(*full, *crop) < 1 or not 0 <= sphere.left <= full[1] - crop[1]:
        return None
    unit = width / crop[1]
    if abs(height / crop[0] / unit - 1) > 0.02:
        return None
    horizon = full[0] / 2 - sphere.top
    if abs(horizon - crop[0] / 2) <= 0.5:  # the middle, but for a row that cannot be halved
        horizon = crop[0] / 2
    return full[1] * unit, sphere.left * unit, horizon * height / crop[0]


def from_projection(
    pixels: torch.Tensor, seen: torch.Tensor | None, shape: Projection, needed_width: float, fill: Sequence[float]
) -> Panorama:
    """A picture of another projection on the whole sphere."""
    laid, covered = to_equirectangular(pixels, shape, needed_width, _neutral(fill, pixels))
    seen = _mask_by(lambda mask: to_equirectangular(mask, shape, needed_width, torch.zeros(1))[0], seen)
    return Panorama(laid, covered, seen)


def _mask_by(function: Callable[[torch.Tensor], torch.Tensor], seen: torch.Tensor | None) -> torch.Tensor | None:
    """What a function of pixels [H, W, C] makes of what is seen of them: where at least half of it is."""
    return None if seen is None else function(seen[..., None].float())[..., 0] >= 0.5


def place(
    pixels: torch.Tensor,
    seen: torch.Tensor | None,
    scale: int,
    size: tuple[int, int],
    area: tuple[int, int, int, int] | None,
    needed_width: float,
    fill: Sequence[float],
    strict_aspect: bool,
    name: str,
    max_pixels: int,
) -> Panorama:
    """Pixels of an image of `size` (height, width), reduced by `scale`, and what of them is seen, at their place on the
    whole sphere; `area` is that place as :func:`area_of` has it."""
    height, width = size
    even = height % scale == width % scale == 0
    if area is None:
        unit = scale if even else 1
        area = middle_of_the_sphere(height // unit, width // unit)
        if area is None:
            area = (height, width, 0, 0)
        else:
            area = (area[0] * unit, area[1] * unit, area[2] * unit, area[3] * unit)
            degrees = f"{360 * width / area[1]:.0f} x {180 * height / area[0]:.0f}"
            problem = f"{name} is {width} x {height} pixels, not 2:1, and has no Photo Sphere data"
            problem += hint(height, width)
            if strict_aspect:
                raise ValueError(
                    f"{problem}; give a whole panorama, write GPano data into the file, or use strict_aspect=False to "
                    f"take it as the middle {degrees} degrees"
                )
            warnings.warn(f"{problem}: taken as the middle {degrees} degrees of the sphere", stacklevel=4)
    full_height, full_width, top, left = area
    is_whole = (full_height, full_width) == (height, width)
    if is_whole and even:
        return Panorama(pixels, seen=seen)
    covered = None if is_whole else _shares(area, height, width)
    neutral = _neutral(fill, pixels)

    # Reduced before it is laid on the canvas, so that the canvas is no larger than what is needed.
    most = max(1, int(full_width / needed_width))
    divides = even and all(number % scale == 0 for number in area)
    dividing = [k for k in range(1, most + 1) if full_width % k == full_height % k == 0 and k % scale == 0]
    k = dividing[-1] if divides and dividing else scale
    is_coarse = most > k and full_height * full_width > max(LARGE, height * width) * k**2
    k = max(most, scale) if is_coarse or not divides else k
    canvas_size = (full_height // k, full_width // k)
    _check_canvas(*canvas_size, max_pixels)
    seen = _mask_by(partial(_laid, scale=scale, size=size, area=area, canvas=canvas_size, neutral=torch.zeros(1)), seen)
    if is_coarse or not divides:
        pixels, scale = block_means(pixels, k // scale), k // scale * scale
        return Panorama(_laid(pixels, scale, size, area, canvas_size, neutral), covered, seen)
    k //= scale
    height, width, full_height, full_width, top, left = (n // scale for n in (*size, *area))
    row, column = top // k, left // k
    rows, columns = -(-(top + height) // k) - row, -(-(left + width) // k) - column
    part = neutral.expand(rows * k, columns * k, 3).clone()
    part[top - row * k :, left - column * k :][:height, :width] = pixels
    canvas = neutral.expand(*canvas_size, 3).clone()
    canvas[row : row + rows, column : column + columns] = block_means(part, k)
    return Panorama(canvas, covered, seen)


def _neutral(fill: Sequence[float], pixels: torch.Tensor) -> torch.Tensor:
    """The colour of what was not seen, [3], as pixels are."""
    neutral = torch.tensor(fill, device=pixels.device) * (255 if pixels.dtype == torch.uint8 else 1)
    return (neutral.round() if pixels.dtype == torch.uint8 else neutral).to(pixels.dtype)


def check_looks(pixels: torch.Tensor, size: tuple[int, int], strict_aspect: bool, name: str) -> None:
    """Say it where a picture of 2:1 is clearly no equirectangular panorama; `size` is (height, width) of its file."""
    found = looks_like(pixels) if middle_of_the_sphere(*size) is None else None
    if found is not None:
        words = f"no equirectangular panorama: {name} looks like {found}"
        if strict_aspect:
            raise ValueError(f"{words}; projection='equirectangular' says that it is one, or use strict_aspect=False")
        warnings.warn(f"{words}; projection='equirectangular' says that it is one", stacklevel=4)


def _check_canvas(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise ValueError(
            f"the whole sphere of which it shows a part has {width} x {height} pixels, and max_pixels is {max_pixels}. "
            "Give a smaller file, or a larger max_pixels"
        )


def _laid(
    pixels: torch.Tensor,
    scale: int,
    size: tuple[int, int],
    area: tuple[int, int, int, int],
    canvas: tuple[int, int],
    neutral: torch.Tensor,
) -> torch.Tensor:
    """Pixels of an image of `size`, reduced by `scale`, on a `canvas` (rows, columns) of the whole sphere: each pixel
    of it is the mean of the area that it covers, `neutral` where the image shows nothing."""
    apart = (pixels - neutral.float()).cpu().numpy()  # nothing where the image shows nothing
    for axis in (0, 1):
        length, first, whole = size[axis], area[2 + axis], area[axis]
        old = first + np.minimum(np.arange(apart.shape[axis] + 1) * scale, length)
        new = np.arange(canvas[axis] + 1) * (whole / canvas[axis])
        lines = np.ascontiguousarray(np.moveaxis(apart, axis, 0))
        apart = np.moveaxis(_area_means(lines.reshape(len(lines), -1), old, new).reshape(-1, *lines.shape[1:]), 0, axis)
    laid = torch.from_numpy(np.ascontiguousarray(apart)).to(pixels.device) + neutral
    return (laid.round() if pixels.dtype == torch.uint8 else laid).to(pixels.dtype)


def _area_means(values: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Cells [n, m] between the `old` edges [n + 1], as means over those between the `new` [N + 1]: [N, m], float32.
    Beyond the old ones there is 0."""
    out = np.empty((len(new) - 1, values.shape[1]), np.float32)
    place = np.clip(new, old[0], old[-1])
    cell = np.clip(np.searchsorted(old, place, side="right") - 1, 0, len(values) - 1)
    for first in range(0, values.shape[1], 2048):  # in float64, so a part at a time
        part = values[:, first : first + 2048].astype(np.float64)
        upto = np.concatenate([np.zeros((1, part.shape[1])), np.cumsum(part * np.diff(old)[:, None], axis=0)])
        integral = upto[cell] + part[cell] * (place - old[cell])[:, None]
        out[:, first : first + 2048] = np.diff(integral, axis=0) / np.diff(new)[:, None]
    return out


def covered_by_size(height: int, width: int) -> tuple[float, float, float, float] | None:
    """What an image [height, width] without Photo Sphere data covers, as :attr:`Panorama.covered`."""
    area = middle_of_the_sphere(height, width)
    return None if area is None else _shares(area, height, width)


def middle_of_the_sphere(height: int, width: int) -> tuple[int, int, int, int] | None:
    """The place, as :func:`area_of` has it, of an image of which nothing is known but its size; `None` where it is
    the whole sphere."""
    if abs(width / height - 2) <= 0.02:
        return None
    whole = (width / 2, width) if width > 2 * height else (height, 2 * height)
    full = (math.ceil(whole[0]), math.ceil(whole[1]))
    return *full, (full[0] - height) // 2, (full[1] - width) // 2


def _shares(area: tuple[int, int, int, int], height: int, width: int) -> tuple[float, float, float, float]:
    """The part of the sphere at a place, as :attr:`Panorama.covered`."""
    full_height, full_width, top, left = area
    return top / full_height, (top + height) / full_height, left / full_width, (left + width) / full_width


def area_of(sphere: PhotoSphere | None, height: int, width: int, name: str) -> tuple[int, int, int, int] | None:
    """Height and width of the whole sphere, top and left of the image in it, in pixels of the decoded image."""
    if sphere is None or sphere.full is None:
        return None
    crop = sphere.crop or sphere.full
    numbers = (*sphere.full, *crop)
    fits = min(numbers) > 0 and min(sphere.top, sphere.left) >= 0 and abs(sphere.full[1] / sphere.full[0] - 2) <= 0.02
    if fits:
        scale = (height / crop[0], width / crop[1])
        full = (round(sphere.full[0] * scale[0]), round(sphere.full[1] * scale[1]))
        top, left = round(sphere.top * scale[0]), round(sphere.left * scale[1])
        fits = abs(scale[0] / scale[1] - 1) <= 0.02 and max(full) <= MAX_SIDE
        if fits and top + height <= full[0] and left + width <= full[1]:
            return *full, top, left
    warnings.warn(f"the Photo Sphere data of {name} do not fit its {width} x {height} pixels, ignored", stacklevel=5)
    return None


def turned(panorama: Panorama, yaw: float) -> Panorama:
    """The panorama with another front: `yaw` degrees to the right of the present one, to the nearest column."""
    if panorama.rotation is not None:
        return replace(panorama, rotation=panorama.rotation @ yaw_rotation(yaw))
    width = panorama.pixels.shape[1]
    shift = round(yaw / 360 * width) % width
    covered = panorama.covered
    if covered is not None and covered[3] - covered[2] < 1:
        left = (covered[2] - shift / width) % 1
        covered = (covered[0], covered[1], left, left + covered[3] - covered[2])
    seen = panorama.seen
    if seen is not None:
        seen = seen.roll(-round(yaw / 360 * seen.shape[1]), dims=1)
    return replace(panorama, pixels=panorama.pixels.roll(-shift, dims=1), covered=covered, seen=seen)


def flipped(panorama: Panorama) -> Panorama:
    """The panorama with left and right exchanged: what is at a yaw comes to its negative."""
    covered = panorama.covered
    if covered is not None and covered[3] - covered[2] < 1:
        left = (1 - covered[3]) % 1
        covered = (covered[0], covered[1], left, left + covered[3] - covered[2])
    seen, rotation = panorama.seen, panorama.rotation
    if rotation is not None:
        rotation = _LEFT_RIGHT @ rotation @ _LEFT_RIGHT
    return Panorama(panorama.pixels.flip(1), covered, None if seen is None else seen.flip(1), rotation)


def resampled(panorama: Panorama) -> Panorama:
    """The panorama with pixels that lie as it is shown."""
    assert panorama.rotation is not None
    pixels = torch.from_numpy(rotated_pixels(panorama.pixels.cpu().numpy(), panorama.rotation))
    seen = seen_everywhere(panorama)
    if seen is not None:
        seen = torch.from_numpy(
            rotated_pixels(seen.numpy().astype(np.float32)[..., None], panorama.rotation)[..., 0] >= 0.5
        )
    return Panorama(pixels.to(panorama.pixels.device), seen=seen)


def seen_everywhere(panorama: Panorama) -> torch.Tensor | None:
    """What the camera saw, bool [h, w] on the whole sphere of the pixels; `None` where it is all."""
    if panorama.covered is None:
        return panorama.seen
    height, width = panorama.pixels.shape[:2] if panorama.seen is None else panorama.seen.shape
    top, bottom, left, right = panorama.covered
    row, column = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    inside = ((row > top) & (row < bottom))[:, None] & ((column - left) % 1 < right - left)
    return inside if panorama.seen is None else inside & panorama.seen
