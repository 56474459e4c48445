"""Sampling: pixels of the whole sphere to the views of a plan, and back."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from .geometry_panorama import View, ViewPlan, camera_rotation, ray_angles

try:  # faster on a CPU; without it torch makes the same views
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

Backend = Literal["opencv", "torch"]
# Where a pixel is sampled, from its middle. Two places stand a little closer than evenly (0.25), because a bilinear
# sample is blurred itself: this is 0.4 dB nearer to the reference of benchmarks/views.py.
_ASIDE = {1: np.zeros(1), 2: np.array([-0.235, 0.235])}
_ROWS = 256  # of a panorama that are tilted at a time
_STEPS = 32  # a place in the source is rounded to 1/32 pixel: OpenCV 4 samples no finer
_IMPORTED_IN = os.getpid()


def erp_to_views(
    erp: torch.Tensor,
    plan: ViewPlan,
    image_size: int,
    backend: Backend | None = None,
    out: torch.Tensor | None = None,
    rotation: np.ndarray | None = None,
) -> torch.Tensor:
    """Sample the views of a plan.

    A panorama with more detail than the views need is first reduced (mean over areas) to about twice their resolution
    and sampled at 2 x 2 places a pixel, so that nothing aliases; it wraps at the seam and goes on over the poles.

    Args:
        erp: [C, H, W], uint8 or float of any range.
        plan: the views.
        image_size: side of the views in pixels.
        backend: `"opencv"` or `"torch"`; where it is not given, OpenCV on a CPU that has it. Both give the same views
            to half a step of uint8.
        out: where the views are to be written, what is returned.
        rotation: [3, 3], turns directions of the views into those of the panorama, where its camera was not level.

    Returns:
        [V, C, image_size, image_size] on the same device, float32 (or the dtype of `erp`), in the range of `erp`.
    """
    use_one_thread_in_a_worker(os.getpid())
    backend = backend or _backend_for(erp)
    if out is None:
        dtype = erp.dtype if erp.is_floating_point() else torch.float32
        out = torch.empty(plan.num_views, len(erp), image_size, image_size, dtype=dtype, device=erp.device)
    pixels = erp.permute(1, 2, 0)  # [H, W, C]
    all_views = _rotated(plan, rotation)
    for kind, fov in sorted({(view.kind, view.fov) for view in all_views}):
        indices = [index for index, view in enumerate(all_views) if (view.kind, view.fov) == (kind, fov)]
        source, sphere, samples = _prefilter(pixels, kind, fov, image_size, backend, rotation is not None)
        views, targets = [all_views[index] for index in indices], [out[index] for index in indices]
        _warp(source, sphere, views, samples, targets, backend)
    return out


def _rotated(plan: ViewPlan, rotation: np.ndarray | None) -> tuple[View, ...]:
    """The views of a plan as a panorama shows them whose sphere is rotated."""
    return plan.views if rotation is None else tuple(view.rotated(rotation) for view in plan.views)


def _backend_for(erp: torch.Tensor) -> Backend:
    """OpenCV where it is installed and can sample this panorama [C, H, W]."""
    fits = erp.device.type == "cpu" and erp.dtype in (torch.uint8, torch.float32) and len(erp) == 3
    return "opencv" if fits and cv2 is not None and not erp.requires_grad else "torch"


def view_mask(
    plan: ViewPlan,
    covered: tuple[float, float, float, float] | None,
    rotation: np.ndarray | None = None,
    seen: torch.Tensor | None = None,
    min_seen: float = 0.0,
) -> torch.Tensor:
    """Which views show something that the camera saw, bool [V].

    Args:
        plan: the views.
        covered, seen: the part of the sphere that the camera saw, as :class:`Panorama` has it.
        rotation: as :func:`erp_to_views` has it.
        min_seen: the share of a view that must show it, of 64 x 64 places; where no view shows as much, those count
            that show most.
    """
    if covered is None and seen is None:
        return torch.ones(plan.num_views, dtype=torch.bool)
    shares = []
    for view in _rotated(plan, rotation):
        directions = _rotated_directions if view.roll else _directions
        row, column = directions(view, 64, 1)  # shares of the sphere's rows and columns
        inside = np.ones(row.shape, bool)
        if covered is not None:
            top, bottom, left, right = covered
            inside &= (row > top) & (row < bottom) & ((column - left) % 1 < right - left)
        if seen is not None:
            height, width = seen.shape
            places = (row * height).astype(int).clip(0, height - 1), (column * width).astype(int) % width
            inside &= seen.cpu().numpy()[places]
        shares.append(inside.mean())
    least = min(min_seen, max(shares))
    return torch.tensor([share > 0 and share >= least for share in shares])


def tilted_pixels(pixels: np.ndarray, pitch: float, roll: float) -> np.ndarray:
    """An equirectangular image [H, W, C] as a camera that was not level would have written it; bilinear, all around."""
    return rotated_pixels(pixels, camera_rotation(pitch, roll))


def rotated_pixels(pixels: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """An equirectangular image [H, W, C] of the same sphere rotated: `rotation` [3, 3] turns directions of what comes
    out into those of what is given. Bilinear, all around."""
    height, width = pixels.shape[:2]
    whole = View("erp")
    out = np.empty_like(pixels)
    for top in range(0, height, _ROWS):
        rows = np.arange(top, min(top + _ROWS, height))
        rays = whole.rays_at(rows[:, None], np.arange(width), (height, width))
        row, column, _ = whole.cells(rays @ rotation.T, (height, width))
        sampled = _bilinear(pixels, row, column)
        out[top : top + len(rows)] = sampled.round() if pixels.dtype == np.uint8 else sampled
    return out


def _bilinear(pixels: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Pixels at places of an equirectangular image; it wraps at the seam, and ends at the poles with its last row."""
    height, width = pixels.shape[:2]
    row = np.clip(row, 0, height - 1)
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    down, right = (row - top)[..., None], (column - left)[..., None]
    below, left, beside = np.minimum(top + 1, height - 1), left % width, (left + 1) % width
    upper = pixels[top, left] * (1 - right) + pixels[top, beside] * right
    lower = pixels[below, left] * (1 - right) + pixels[below, beside] * right
    return upper * (1 - down) + lower * down


def views_to_erp(views: torch.Tensor, plan: ViewPlan, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The way back: paint views, or values of tokens such as attention, onto the sphere.

    Where several tiles show a direction they are blended, each with a weight that falls to nothing at its border; the
    global view shows only where no tile does.

    Args:
        views: [V, C, rows, columns], the cells of each view.
        plan: the views.
        height: of the panorama; it is twice as wide.

    Returns:
        The panorama [C, height, 2 * height], zero where no view looks, and a bool mask [height, 2 * height], true
        where one does.

    Raises:
        ValueError: where there are not as many views as the plan has.
    """
    if views.ndim != 4 or len(views) != plan.num_views:
        raise ValueError(
            f"views must be [V, C, rows, columns] with the plan's {plan.num_views} views, got {list(views.shape)}"
        )
    grid = (views.shape[2], views.shape[3])
    rays = View("erp").rays((height, 2 * height))
    painted = views.new_zeros(views.shape[1], height, 2 * height)
    total = views.new_zeros(height, 2 * height)
    for view, values in zip(plan.views, views, strict=True):
        row, column, inside = view.cells(rays, grid, margin=0.5)
        weight = np.full(row.shape, 1e-9) if view.is_global else np.where(inside, _to_border(row, column, grid), 0.0)
        share = torch.from_numpy(weight).to(views)
        padded = _pad_global(values) if view.is_global else F.pad(values[None], (1, 1, 1, 1), mode="replicate")[0]
        place = np.stack([2 * (column + 1) / (grid[1] + 1) - 1, 2 * (row + 1) / (grid[0] + 1) - 1], -1)
        sampled = F.grid_sample(padded[None], torch.from_numpy(place).to(views)[None], align_corners=True)[0]
        painted += sampled * share
        total += share
    return painted / total.clamp(min=1e-12), total > 0


def _to_border(row: np.ndarray, column: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """How far a place in a tile is from its border, as a share of the tile: 0.5 in the middle, 1e-4 at the border."""
    rows, columns = grid
    shares = np.minimum(row, rows - 1 - row) / rows, np.minimum(column, columns - 1 - column) / columns
    return np.maximum(np.minimum(*shares), 1e-4)


def _pad_global(values: torch.Tensor) -> torch.Tensor:
    """[C, h, w] -> [C, h + 2, w + 2]: one more cell all around."""
    _, height, width = values.shape
    return _cut(values.permute(1, 2, 0), width, (-1, height + 1, -1, width + 1)).permute(2, 0, 1)


def _tile_width(fov: float, image_size: int) -> float:
    """Columns around the whole sphere at the resolution of the middle of a tile."""
    return math.pi * image_size / math.tan(math.radians(fov) / 2)


def needed_width(plan: ViewPlan, image_size: int) -> float:
    """Columns around the whole sphere that the views need: a file may be decoded as small as this. A tile of 90 degrees
    is twice as fine at its border as in its middle."""
    return max(
        2 * _tile_width(view.fov, image_size)
        if view.kind == "perspective"
        else max(2 * image_size, image_size * 360 / view.fov)
        for view in plan.views
    )


def _prefilter(
    pixels: torch.Tensor, kind: str, fov: float, image_size: int, backend: Backend, is_rotated: bool = False
) -> tuple[torch.Tensor, tuple[float, float], int]:
    """Reduce [H, W, C] to what views of one kind need.

    Returns:
        The source [h, w, C]; the rows and columns of it that are the whole sphere, which are not whole numbers where
        the reduction does not divide the size; and at how many places a side of a pixel it is to be sampled.
    """
    height, width = pixels.shape[:2]
    if kind == "erp":
        size, samples = (image_size, round(image_size * 360 / fov)), 1
        if is_rotated:  # no pixel of the view is one of the source any more: these are finer
            size, samples = (2 * image_size, max(4 * image_size, 2 * size[1])), 2
        if height < size[0] or width < size[1]:
            return pixels, (height, width), samples
        return _area(pixels, size, backend), size, samples
    needed = _tile_width(fov, image_size)
    samples = 2 if width >= 1.5 * needed else 1
    k = max(1, int(width / (samples * needed)))
    if k == 1:
        return pixels, (height, width), samples
    return _block_means(pixels, k, backend), (height / k, width / k), samples


def _block_means(pixels: torch.Tensor, k: int, backend: Backend) -> torch.Tensor:
    """[H, W, C] -> [ceil(H / k), ceil(W / k), C]: means over k x k pixels. Where k does not divide a side, the last
    blocks reach over the lower pole and the seam."""
    height, width = pixels.shape[:2]
    beyond = pixels[height - (-height % k) :].flip(0).roll(width // 2, 1)  # over the lower pole
    pixels = torch.cat([pixels, beyond])
    pixels = torch.cat([pixels, pixels[:, : -width % k]], dim=1)
    if pixels.dtype == torch.uint8 and backend == "torch":  # rounded as OpenCV does
        total = F.avg_pool2d(pixels.permute(2, 0, 1)[None].float(), k, divisor_override=1)[0].permute(1, 2, 0)
        return ((total + 2) / 4).floor() if k == 2 else (total * (1 / k**2)).round()
    return _area(pixels, (pixels.shape[0] // k, pixels.shape[1] // k), backend)


def _area(pixels: torch.Tensor, size: tuple[int, int], backend: Backend) -> torch.Tensor:
    """[H, W, C] -> [*size, C], no larger: each pixel the mean of the area it covers."""
    if pixels.shape[:2] == size:
        return pixels
    if backend == "opencv":
        return torch.from_numpy(cv2.resize(pixels.contiguous().numpy(), size[::-1], interpolation=cv2.INTER_AREA))
    image = pixels if pixels.is_floating_point() else pixels.float()
    rows, columns = (_area_weights(old, new).to(image) for old, new in zip(image.shape[:2], size, strict=True))
    return torch.einsum("rh,hwc,qw->rqc", rows, image, columns)


@lru_cache(maxsize=8)
def _area_weights(old: int, new: int) -> torch.Tensor:
    """How much of each of the old cells lies in each of the new ones, [new, old]."""
    edges = np.arange(new + 1) * (old / new)
    cells = np.arange(old)
    common = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return torch.from_numpy(np.maximum(common, 0) * (new / old)).float()


def _cut(source: torch.Tensor, turn: float, box: tuple[int, int, int, int]) -> torch.Tensor:
    """Rows top to bottom and columns left to right of the sphere. Beyond the edges of the source [h, w, C] it goes on:
    at the other side, or beyond a pole, by one row, half a turn away. `turn` of the w columns are the whole turn; where
    they are not all, no more than one column beyond them can be asked for."""
    top, bottom, left, right = box
    height, width, channels = source.shape
    first = left % width
    if top >= 0 and bottom <= height and first + right - left <= width:
        return source[top:bottom, first : first + right - left]
    out = source.new_empty(bottom - top, right - left, channels)
    rows = [(max(top, 0), min(bottom, height), 0)]  # first, last, columns to turn by
    if top < 0:
        rows.insert(0, (0, 1, width // 2))
    if bottom > height:
        rows.append((height - 1, height, width // 2))
    share = width - turn  # of a column that overlaps with the first
    below = 0
    for first, last, turned in rows:
        strip = out[below : below + last - first]
        below += last - first
        done = 0
        while done < right - left:
            start = (left + turned + done) % width
            end = min(width, start + right - left - done)
            strip[:, done : done + end - start] = source[first:last, start:end]
            done += end - start
        for column, near, far in ((-1, width - 1, width - 2), (width, 0, 1)) if share else ():
            if left <= column < right:
                near, far = (near + turned) % width, (far + turned) % width
                mixed = source[first:last, near] * (1 - share) + source[first:last, far] * share
                strip[:, column - left] = mixed.round() if source.dtype == torch.uint8 else mixed
    return out


def _warp(
    source: torch.Tensor,
    sphere: tuple[float, float],
    views: Sequence[View],
    samples: int,
    out: Sequence[torch.Tensor],
    backend: Backend,
) -> None:
    """Sample the source [h, w, C], whose `sphere` rows and columns are the whole sphere, into each of `out`
    [C, size, size], at `samples` places a side of a pixel."""
    width = source.shape[1]
    size = out[0].shape[-1]
    dtype = np.uint8 if source.dtype == torch.uint8 else np.float32
    shapes = [(samples * size, samples * size, 4), (size, size, 4)]
    buffers = [np.empty(shapes[0], dtype), *(np.empty(shape, np.int16) for shape in shapes)]  # new memory is slow
    turns = sphere[1] == width
    for view, target in zip(views, out, strict=True):
        # Views of one pitch share their places: only the part of the sphere differs.
        start, rest = divmod(view.yaw / 360 * width, 1) if turns else (0, view.yaw / 360 * sphere[1])
        own = replace(view, yaw=rest * 360 / sphere[1], row=0)
        # Of a panorama that was not level, no other view has the same: nothing to keep.
        find_places = _places.__wrapped__ if view.roll else _places
        (top, bottom, left, right), places = find_places(own, size, samples, sphere)
        part = _cut(source, sphere[1], (top, bottom, left + int(start), right + int(start)))
        if backend == "opencv":
            _warp_opencv(part.numpy(), places, samples, buffers, target)
        else:
            _warp_torch(part, places, samples, target)


def _warp_opencv(
    part: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    samples: int,
    buffers: list[np.ndarray],
    target: torch.Tensor,
) -> None:
    """Sample a part of the source [h, w, 3] at `places`, columns and rows [n, n] each, with OpenCV into `target`
    [3, size, size], n = samples * size; `buffers` are its working memory."""
    view, wide, small = buffers
    part = cv2.cvtColor(part, cv2.COLOR_RGB2RGBA)  # OpenCV 5 samples four channels twice as fast as three
    cv2.remap(part, *places, cv2.INTER_LINEAR, dst=view, borderMode=cv2.BORDER_REPLICATE)
    unit = 1
    if samples > 1 and view.dtype == np.uint8:  # in 1/64, so that the mean is not rounded
        np.left_shift(view, 6, out=wide, dtype=np.int16)
        view, unit = cv2.resize(wide, small.shape[:2], dst=small, interpolation=cv2.INTER_AREA), 64
    elif samples > 1:
        view = cv2.resize(view, small.shape[:2], interpolation=cv2.INTER_AREA)
    for plane, channel in zip(cv2.split(view)[:3], target.numpy(), strict=True):
        np.multiply(plane, np.float32(1 / unit), out=channel, dtype=np.float32)


def _warp_torch(part: torch.Tensor, places: tuple[np.ndarray, np.ndarray], samples: int, target: torch.Tensor) -> None:
    """As :func:`_warp_opencv`, with torch on the device of `part` [h, w, C]."""
    height, width = part.shape[:2]
    column_row = torch.from_numpy(np.stack(places, -1)).double()
    grid = column_row * torch.tensor([2 / (width - 1), 2 / (height - 1)]) - 1  # [n, n, 2] in [-1, 1]
    source = part.permute(2, 0, 1)[None].to(target.dtype)
    sampled = F.grid_sample(source, grid.to(source)[None], padding_mode="border", align_corners=True)
    target.copy_((F.avg_pool2d(sampled, samples) if samples > 1 else sampled)[0])


@lru_cache(maxsize=64)
def _places(
    view: View, size: int, samples: int, sphere: tuple[float, float]
) -> tuple[tuple[int, int, int, int], tuple[np.ndarray, np.ndarray]]:
    """Where a view samples a source whose sphere has (rows, columns).

    Returns:
        The part of the sphere that it shows, rows top to bottom and columns left to right; and the columns and rows of
        the places in this part, float32 [n, n] each with n = samples * size, in steps of 1/32.
    """
    directions = _rotated_directions if view.roll else _directions
    row, column = (share * whole for share, whole in zip(directions(view, size, samples), sphere, strict=True))
    for place in (row, column):
        place -= 0.5
        place *= _STEPS
        np.rint(place, out=place)
        place /= _STEPS
    (top, bottom), (left, right) = ((math.floor(place.min()), math.floor(place.max()) + 2) for place in (row, column))
    row -= top
    column -= left
    return (top, bottom, left, right), (column, row)


@lru_cache(maxsize=64)
def _directions(view: View, size: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `samples` places a side of each pixel of a view look, as shares of the sphere's rows and columns in [0, 1]:
    float32 [samples * size, samples * size] each, right to 0.001 of a pixel of a panorama 16,384 wide."""
    aside = _ASIDE[samples]
    along = (np.arange(size)[:, None] + aside).ravel()
    row, column = (np.empty((len(along), len(along)), np.float32) for _ in range(2))
    for first in range(0, len(along), 64):  # rows at a time: what rays take in between is much larger
        band = slice(first, first + 64)
        yaw, pitch = ray_angles(view.rays_at(along[band, None], along, (size, size)))
        row[band], column[band] = 0.5 - pitch / 180, yaw / 360 + 0.5
    return row, column


def _rotated_directions(view: View, size: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_directions`, of a view that leans: these are as many as there are panoramas, so that they are made
    fast instead of kept (torch has a fast arctangent), and as exactly."""
    rays = _camera_rays(view.kind, view.fov, size, samples)
    right, up, ahead = torch.tensordot(torch.from_numpy(view.rotation).float(), rays, 1)
    yaw, pitch = torch.atan2(right, ahead), torch.atan2(up, torch.hypot(right, ahead))
    return (0.5 - pitch / math.pi).numpy(), (yaw / (2 * math.pi) + 0.5).numpy()


@lru_cache(maxsize=8)
def _camera_rays(kind: Literal["erp", "perspective"], fov: float, size: int, samples: int) -> torch.Tensor:
    """Rays of the places of a view as its own camera sees them, [3, samples * size, samples * size]: arctangents take a
    tenth of the time of what lies side by side."""
    along = (np.arange(size)[:, None] + _ASIDE[samples]).ravel()
    rays = View(kind, fov=fov).rays_at(along[:, None], along, (size, size))
    return torch.from_numpy(rays).float().movedim(-1, 0).contiguous()


@cache
def use_one_thread_in_a_worker(pid: int) -> None:
    """The threads of OpenMP and OpenCV do not survive a fork (a worker of `datasets.map` would wait for them forever),
    and workers share the cores as it is."""
    if pid != _IMPORTED_IN:
        torch.set_num_threads(1)
        if cv2 is not None:
            cv2.setNumThreads(0)
