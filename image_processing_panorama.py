"""The image processor: an equirectangular (ERP) panorama in, the views of a plan out."""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs

from .geometry_panorama import View, ViewOptions, ViewPlan, ray_angles
from .reading_panorama import ImageSource, content_digest, open_image, read_panorama

try:  # faster on a CPU; without it torch makes the same views
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Backend = Literal["opencv", "torch"]
# Where a pixel is sampled, from its middle. Two places stand a little closer than evenly (0.25), because a bilinear
# sample is blurred itself: this is 0.4 dB nearer to the reference of benchmarks/views.py.
_ASIDE = {1: np.zeros(1), 2: np.array([-0.235, 0.235])}
_STEPS = 32  # a place in the source is rounded to 1/32 pixel: OpenCV 4 samples no finer
_READ_OPTIONS = ("strict_aspect", "align_heading")
_IMPORTED_IN = os.getpid()
_CACHE_VERSION = 1  # to be raised when the same file and options give other views


class PanoramaImagesKwargs(ImagesKwargs, total=False):
    """Options of a call, beside those of every image processor."""

    image_size: int
    view_strategy: str
    fov_deg: float
    overlap_ratio: float
    pitch_rows: list[float]
    pole_caps: bool
    strict_aspect: bool
    align_heading: bool
    yaw_offsets: list[float]
    cache_dir: str


class PanoramaImageProcessor(BaseImageProcessor):
    """ERP panoramas -> `pixel_values` [B, V, 3, H, W], normalised.

    Args:
        image_size: side of each view in pixels.
        view_strategy, fov_deg, overlap_ratio, pitch_rows, pole_caps: the plan of views, as in :class:`PanoramaConfig`.
        image_mean, image_std: of the vision tower, for values in [0, 1]. The defaults are SigLIP's. What the camera
            did not see is filled with the mean, zero after normalisation.
        strict_aspect: refuse an image that is not 2:1 and has no Photo Sphere data. Else it is taken as a band around
            the horizon, with a warning.
        align_heading: turn panoramas whose Photo Sphere data say where north is, so that north is in front.
        cache_dir: a folder that keeps prepared views (as uint8, to half a grey level) for the next time; keyed by the
            content of the file and by every option that changes views. Not saved with the processor.
    """

    model_input_names = ["pixel_values", "view_mask"]
    valid_kwargs = PanoramaImagesKwargs

    def __init__(
        self,
        *,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        strict_aspect: bool = False,
        align_heading: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        given = {name: kwargs.pop(name) for name in ViewOptions.names() if name in kwargs}
        super().__init__(**kwargs)
        for name, value in asdict(ViewOptions(**given)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        if min(image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {list(image_std)}. Typical value: [0.5, 0.5, 0.5]")
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.strict_aspect = strict_aspect
        self.align_heading = align_heading
        self.cache_dir = cache_dir

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but `cache_dir`, which belongs to a machine."""
        return {name: value for name, value in super().to_dict().items() if name != "cache_dir"}

    @property
    def view_plan(self) -> ViewPlan:
        """The views of one panorama."""
        return ViewOptions(**{name: getattr(self, name) for name in ViewOptions.names()}).plan

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open whatever names or holds an image, without decoding it; arrays, tensors and PIL images stay. Lists keep
        their nesting."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith(("http://", "https://", "data:")):
            return load_image(image_url_or_urls)
        return open_image(image_url_or_urls)

    def preprocess(
        self,
        images: ImageSource | Sequence[Any],
        *args: Any,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Cut panoramas into views.

        Args:
            images: a panorama, or a list of them, nested or not; B in all, in reading order. Each is a path, bytes, a
                file object, a PIL image, a row of a `datasets.Image` column, or an array or tensor [H, W, 3],
                [3, H, W] or [H, W] (with alpha, too), of uint8, uint16, or float in [0, 1]. Sizes may differ.
            return_tensors: `"pt"` or `"np"`; without it lists of B tensors.
            kwargs: any option of the constructor, for this call alone; `yaw_offsets`, degrees to the right of the
                front of each panorama that become its front; `device`, where the views are made and returned.

        Returns:
            `pixel_values` [B, V, 3, image_size, image_size], and where a panorama is partial `view_mask` [B, V], false
            for a view that shows nothing the camera saw.

        Raises:
            ValueError: for a panorama that cannot be read or is not what an option asks for; it is named.
        """
        _use_one_thread_in_a_worker(os.getpid())
        options = {
            name: getattr(self, name) if kwargs.get(name) is None else kwargs[name]
            for name in ("image_mean", "image_std", "cache_dir", *_READ_OPTIONS, *ViewOptions.names())
        }
        sources = _flatten(self.fetch_images(images))
        yaw_offsets = kwargs.get("yaw_offsets")
        yaw_offsets = [0.0] * len(sources) if yaw_offsets is None else list(yaw_offsets)
        if len(yaw_offsets) != len(sources):
            raise ValueError(f"yaw_offsets must name one angle a panorama, got {len(yaw_offsets)} for {len(sources)}")

        view_options = ViewOptions(**{name: options[name] for name in ViewOptions.names()})
        plan, size = view_options.plan, view_options.image_size
        shape = (len(sources), plan.num_views, 3, size, size)
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cpu":  # numpy asks Linux for huge pages, torch does not; new memory is slow
            pixel_values = torch.from_numpy(np.empty(shape, np.float32))
        else:
            pixel_values = torch.empty(shape, device=device)
        masks = [
            self._make_views(source, plan, options, float(yaw_offset), views)
            for source, yaw_offset, views in zip(sources, yaw_offsets, pixel_values, strict=True)
        ]
        mean, std = (
            255 * torch.tensor(options[name], device=device).view(3, 1, 1) for name in ("image_mean", "image_std")
        )
        for views in pixel_values:  # a few MB at a time, which fit into a cache
            views.sub_(mean).div_(std)
        data: dict[str, Any] = {"pixel_values": pixel_values if return_tensors else list(pixel_values)}
        if not all(bool(mask.all()) for mask in masks):
            data["view_mask"] = masks
        return BatchFeature(data, tensor_type=return_tensors)

    def _make_views(
        self, source: Any, plan: ViewPlan, options: dict[str, Any], yaw_offset: float, out: torch.Tensor
    ) -> torch.Tensor:
        """Write the views of one panorama, in [0, 255], into `out` [V, 3, image_size, image_size]; from the cache where
        there is one. Returns its mask [V]."""
        size = options["image_size"]

        def make() -> torch.Tensor:
            panorama = read_panorama(
                source,
                _needed_width(plan, size),
                fill=options["image_mean"],
                yaw_offset=yaw_offset,
                **{name: options[name] for name in _READ_OPTIONS},
            )
            pixels = panorama.pixels.to(out.device)
            erp_to_views(pixels.permute(2, 0, 1), plan, size, out=out)
            if pixels.is_floating_point():
                out.mul_(255)
            return view_mask(plan, panorama.seen)

        if options["cache_dir"] is None:
            return make()
        key = {name: value for name, value in options.items() if name not in ("cache_dir", "image_std")}
        text = json.dumps([_CACHE_VERSION, content_digest(source), yaw_offset, key], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        file = Path(options["cache_dir"], name[:2], f"{name}.safetensors")
        try:
            stored = load_file(file)
        except FileNotFoundError:
            stored = None
        except (SafetensorError, OSError) as error:
            logger.warning("Prepared views in %s cannot be read and are made again: %s", file, error)
            stored = None
        if stored is None:
            mask = make()
            stored = {"views": out.round().to("cpu", torch.uint8), "mask": mask}
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as unfinished:
                pass
            save_file(stored, unfinished.name)
            os.replace(unfinished.name, file)
        out.copy_(stored["views"])
        return stored["mask"]


def erp_to_views(
    erp: torch.Tensor,
    plan: ViewPlan,
    image_size: int,
    backend: Backend | None = None,
    out: torch.Tensor | None = None,
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

    Returns:
        [V, C, image_size, image_size] on the same device, float32 (or the dtype of `erp`), in the range of `erp`.
    """
    _use_one_thread_in_a_worker(os.getpid())
    if backend is None:
        fits = erp.device.type == "cpu" and erp.dtype in (torch.uint8, torch.float32) and len(erp) == 3
        backend = "opencv" if fits and cv2 is not None and not erp.requires_grad else "torch"
    if out is None:
        dtype = erp.dtype if erp.is_floating_point() else torch.float32
        out = torch.empty(plan.num_views, len(erp), image_size, image_size, dtype=dtype, device=erp.device)
    pixels = erp.permute(1, 2, 0)  # [H, W, C]
    for kind, fov in sorted({(view.kind, view.fov) for view in plan.views}):
        indices = [index for index, view in enumerate(plan.views) if (view.kind, view.fov) == (kind, fov)]
        source, sphere, samples = _prefilter(pixels, kind, fov, image_size, backend)
        _warp(
            source,
            sphere,
            [plan.views[index] for index in indices],
            samples,
            [out[index] for index in indices],
            backend,
        )
    return out


def view_mask(plan: ViewPlan, seen: tuple[float, float, float, float] | None) -> torch.Tensor:
    """Which views show something that the camera saw, bool [V].

    Args:
        plan: the views.
        seen: :attr:`Panorama.seen`.
    """
    if seen is None:
        return torch.ones(plan.num_views, dtype=torch.bool)
    top, bottom, left, right = seen
    mask = []
    for row, column in (_directions(view, 64, 1) for view in plan.views):  # shares of the sphere's rows and columns
        inside = (row > top) & (row < bottom) & ((column - left) % 1 < right - left)
        mask.append(bool(inside.any()))
    return torch.tensor(mask)


def views_to_erp(views: torch.Tensor, plan: ViewPlan, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The way back: paint views, or values of tokens such as attention, onto the sphere.

    Where several tiles see a direction they are blended, each with a weight that falls to nothing at its border; the
    global view shows only where no tile does.

    Args:
        views: [V, C, rows, columns], the cells of each view.
        plan: the views.
        height: of the panorama; it is twice as wide.

    Returns:
        The panorama [C, height, 2 * height], zero where no view looks, and a mask [height, 2 * height] of what is seen.
    """
    if views.ndim != 4 or len(views) != plan.num_views:
        raise ValueError(
            f"views must be [V, C, rows, columns] with the plan's {plan.num_views} views, got {list(views.shape)}"
        )
    rows, columns = grid = (views.shape[2], views.shape[3])
    rays = View("erp").rays((height, 2 * height))
    painted = views.new_zeros(views.shape[1], height, 2 * height)
    total = views.new_zeros(height, 2 * height)
    for view, values in zip(plan.views, views, strict=True):
        row, column, inside = view.cells(rays, grid, margin=0.5)
        if view.is_global:
            weight = np.full(row.shape, 1e-9)
        else:  # from 0.5 in the middle to almost nothing at the border
            to_border = np.minimum(
                np.minimum(row, rows - 1 - row) / rows, np.minimum(column, columns - 1 - column) / columns
            )
            weight = np.where(inside, np.maximum(to_border, 1e-4), 0.0)
        share = torch.from_numpy(weight).to(views)
        padded = _pad_global(values) if view.is_global else F.pad(values[None], (1, 1, 1, 1), mode="replicate")[0]
        place = np.stack([2 * (column + 1) / (columns + 1) - 1, 2 * (row + 1) / (rows + 1) - 1], -1)
        sampled = F.grid_sample(padded[None], torch.from_numpy(place).to(views)[None], align_corners=True)[0]
        painted += sampled * share
        total += share
    return painted / total.clamp(min=1e-12), total > 0


def _pad_global(values: torch.Tensor) -> torch.Tensor:
    """[C, h, w] -> [C, h + 2, w + 2]: one more cell all around."""
    _, height, width = values.shape
    return _cut(values.permute(1, 2, 0), width, (-1, height + 1, -1, width + 1)).permute(2, 0, 1)


def _tile_width(fov: float, image_size: int) -> float:
    """Columns around the whole sphere at the resolution of the middle of a tile."""
    return math.pi * image_size / math.tan(math.radians(fov) / 2)


def _needed_width(plan: ViewPlan, image_size: int) -> float:
    """Columns around the whole sphere that the views need: a file may be decoded as small as this. A tile of 90 degrees
    is twice as fine at its border as in its middle."""
    return max(
        2 * _tile_width(view.fov, image_size)
        if view.kind == "perspective"
        else max(2 * image_size, image_size * 360 / view.fov)
        for view in plan.views
    )


def _prefilter(
    pixels: torch.Tensor, kind: str, fov: float, image_size: int, backend: Backend
) -> tuple[torch.Tensor, tuple[float, float], int]:
    """Reduce [H, W, C] to what views of one kind need.

    Returns:
        The source [h, w, C]; the rows and columns of it that are the whole sphere, which are not whole numbers where
        the reduction does not divide the size; and at how many places a side of a pixel it is to be sampled.
    """
    height, width = pixels.shape[:2]
    if kind == "erp":
        size = (image_size, round(image_size * 360 / fov))
        return (
            (_area(pixels, size, backend), size, 1)
            if height >= size[0] and width >= size[1]
            else (pixels, (height, width), 1)
        )
    needed = _tile_width(fov, image_size)
    samples = 2 if width >= 1.5 * needed else 1
    k = max(1, int(width / (samples * needed)))
    if k == 1:
        return pixels, (height, width), samples
    beyond = pixels[height - (-height % k) :].flip(0).roll(width // 2, 1)  # over the lower pole
    pixels = torch.cat([pixels, beyond])
    pixels = torch.cat([pixels, pixels[:, : -width % k]], dim=1)
    if pixels.dtype == torch.uint8 and backend == "torch":  # rounded as OpenCV does
        total = F.avg_pool2d(pixels.permute(2, 0, 1)[None].float(), k, divisor_override=1)[0].permute(1, 2, 0)
        source = ((total + 2) / 4).floor() if k == 2 else (total * (1 / k**2)).round()
    else:
        source = _area(pixels, (pixels.shape[0] // k, pixels.shape[1] // k), backend)
    return source, (height / k, width / k), samples


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
    covered = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return torch.from_numpy(np.maximum(covered, 0) * (new / old)).float()


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
        part = out[below : below + last - first]
        below += last - first
        done = 0
        while done < right - left:
            start = (left + turned + done) % width
            end = min(width, start + right - left - done)
            part[:, done : done + end - start] = source[first:last, start:end]
            done += end - start
        for column, near, far in ((-1, width - 1, width - 2), (width, 0, 1)) if share else ():
            if left <= column < right:
                near, far = (near + turned) % width, (far + turned) % width
                mixed = source[first:last, near] * (1 - share) + source[first:last, far] * share
                part[:, column - left] = mixed.round() if source.dtype == torch.uint8 else mixed
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
        (top, bottom, left, right), places = _places(own, size, samples, sphere)
        seen = _cut(source, sphere[1], (top, bottom, left + int(start), right + int(start)))
        if backend == "opencv":
            _warp_opencv(seen.numpy(), places, samples, buffers, target)
        else:
            _warp_torch(seen, places, samples, target)


def _warp_opencv(
    seen: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    samples: int,
    buffers: list[np.ndarray],
    target: torch.Tensor,
) -> None:
    view, wide, small = buffers
    seen = cv2.cvtColor(seen, cv2.COLOR_RGB2RGBA)  # OpenCV 5 samples four channels twice as fast as three
    cv2.remap(seen, *places, cv2.INTER_LINEAR, dst=view, borderMode=cv2.BORDER_REPLICATE)
    unit = 1
    if samples > 1 and view.dtype == np.uint8:  # in 1/64, so that the mean is not rounded
        np.left_shift(view, 6, out=wide, dtype=np.int16)
        view, unit = cv2.resize(wide, small.shape[:2], dst=small, interpolation=cv2.INTER_AREA), 64
    elif samples > 1:
        view = cv2.resize(view, small.shape[:2], interpolation=cv2.INTER_AREA)
    for plane, channel in zip(cv2.split(view)[:3], target.numpy(), strict=True):
        np.multiply(plane, np.float32(1 / unit), out=channel, dtype=np.float32)


def _warp_torch(seen: torch.Tensor, places: tuple[np.ndarray, np.ndarray], samples: int, target: torch.Tensor) -> None:
    height, width = seen.shape[:2]
    column_row = torch.from_numpy(np.stack(places, -1)).double()
    grid = column_row * torch.tensor([2 / (width - 1), 2 / (height - 1)]) - 1  # [n, n, 2] in [-1, 1]
    source = seen.permute(2, 0, 1)[None].to(target.dtype)
    sampled = F.grid_sample(source, grid.to(source)[None], padding_mode="border", align_corners=True)
    target.copy_((F.avg_pool2d(sampled, samples) if samples > 1 else sampled)[0])


@lru_cache(maxsize=64)
def _places(
    view: View, size: int, samples: int, sphere: tuple[float, float]
) -> tuple[tuple[int, int, int, int], tuple[np.ndarray, np.ndarray]]:
    """Where a view samples a source whose sphere has (rows, columns).

    Returns:
        The part of the sphere that it sees, rows top to bottom and columns left to right; and the columns and rows of
        the places in this part, float32 [n, n] each with n = samples * size, in steps of 1/32.
    """
    row, column = (share * whole for share, whole in zip(_directions(view, size, samples), sphere, strict=True))
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


@cache
def _use_one_thread_in_a_worker(pid: int) -> None:
    """The threads of OpenMP and OpenCV do not survive a fork (a worker of `datasets.map` would wait for them forever),
    and workers share the cores as it is."""
    if pid != _IMPORTED_IN:
        torch.set_num_threads(1)
        if cv2 is not None:
            cv2.setNumThreads(0)


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for nested in images for image in _flatten(nested)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


PanoramaImageProcessor.register_for_auto_class("AutoImageProcessor")
