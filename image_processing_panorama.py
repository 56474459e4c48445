"""The image processor: an equirectangular (ERP) panorama in, the views of a plan out."""

import io
import math
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs

from .geometry_panorama import View, ViewPlan, check_view_options, make_view_plan

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor


class PanoramaImagesKwargs(ImagesKwargs, total=False):
    """Options of a call, beside those of every image processor."""

    image_size: int
    view_strategy: str
    fov_deg: float
    overlap_ratio: float
    pitch_rows: list[float]
    pole_caps: bool


class PanoramaImageProcessor(BaseImageProcessor):
    """ERP panoramas -> `pixel_values` [B, V, 3, H, W], normalised.

    Args:
        image_size: side of each view in pixels.
        view_strategy, fov_deg, overlap_ratio, pitch_rows, pole_caps: the plan of views, as in :class:`PanoramaConfig`.
        image_mean, image_std: of the vision tower, for values in [0, 1]. The defaults are SigLIP's.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = PanoramaImagesKwargs

    def __init__(
        self,
        image_size: int = 256,
        view_strategy: str = "anyres_e2p",
        fov_deg: float = 90.0,
        overlap_ratio: float = 0.5,
        pitch_rows: Sequence[float] = (0.0,),
        pole_caps: bool = False,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_view_options(view_strategy, fov_deg, overlap_ratio, pitch_rows)
        if not image_size > 0:
            raise ValueError(f"image_size must be positive, got {image_size}. Typical value: 256")
        if min(image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {list(image_std)}. Typical value: [0.5, 0.5, 0.5]")
        self.image_size = image_size
        self.view_strategy = view_strategy
        self.fov_deg = float(fov_deg)
        self.overlap_ratio = float(overlap_ratio)
        self.pitch_rows = [float(pitch) for pitch in pitch_rows]
        self.pole_caps = pole_caps
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @property
    def view_plan(self) -> ViewPlan:
        """The views of one panorama."""
        return make_view_plan(
            self.view_strategy, self.fov_deg, self.overlap_ratio, tuple(self.pitch_rows), self.pole_caps
        )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open whatever names an image (path, URL, bytes); arrays, tensors and PIL images stay. Lists keep their
        nesting."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, bytes):
            return Image.open(io.BytesIO(image_url_or_urls))
        if isinstance(image_url_or_urls, str | os.PathLike):
            return load_image(os.fspath(image_url_or_urls))
        return image_url_or_urls

    def preprocess(
        self,
        images: ImageSource | Sequence[Any],
        *args: Any,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Cut panoramas into views.

        Args:
            images: a panorama (path, bytes, PIL image, array or tensor, [H, W, 3] or [3, H, W]; uint8, or float in
                [0, 1]), or a list of them, nested or not; B in all, in reading order. Sizes may differ.
            return_tensors: `"pt"` or `"np"`; without it a list of B tensors.
            kwargs: any option of the constructor, for this call alone.

        Returns:
            `pixel_values` [B, V, 3, image_size, image_size].
        """
        options = {name: getattr(self, name) for name in ("image_size", "image_mean", "image_std")}
        plan_options = {
            name: getattr(self, name) for name in ("view_strategy", "fov_deg", "overlap_ratio", "pitch_rows")
        }
        options.update({name: kwargs[name] for name in options if kwargs.get(name) is not None})
        plan_options.update({name: kwargs[name] for name in plan_options if kwargs.get(name) is not None})
        check_view_options(**plan_options)
        plan_options["pitch_rows"] = tuple(plan_options["pitch_rows"])
        plan = make_view_plan(**plan_options, pole_caps=kwargs.get("pole_caps", self.pole_caps))

        mean = torch.tensor(options["image_mean"]).view(3, 1, 1)
        std = torch.tensor(options["image_std"]).view(3, 1, 1)
        pixel_values = [
            (erp_to_views(to_erp_tensor(image), plan, options["image_size"]) - mean) / std
            for image in _flatten(self.fetch_images(images))
        ]  # B x [V, 3, image_size, image_size]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


def to_erp_tensor(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """One image as float32 [3, H, W] in [0, 1].

    Raises:
        TypeError: for anything but a PIL image, an array or a tensor.
        ValueError: for a shape that is no image, or float values outside [0, 1].
    """
    if isinstance(image, Image.Image):
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image))
    if not isinstance(image, torch.Tensor):
        raise TypeError(
            f"a panorama must be a path, bytes, a PIL image, an array or a tensor, got {type(image).__name__}"
        )
    shape = tuple(image.shape)
    if image.ndim == 2:
        image = image[None].expand(3, -1, -1)
    elif image.ndim == 3 and shape[-1] in (3, 4) and shape[0] not in (3, 4):
        image = image[..., :3].permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"a panorama must have the shape [H, W, 3], [3, H, W] or [H, W], got {list(shape)}")
    image = image[:3]
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif image.is_floating_point():
        image = image.float()
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"a float panorama must have values in [0, 1], got [{low:g}, {high:g}]")
    else:
        raise ValueError(f"a panorama must be of dtype uint8 or float, got {image.dtype}")
    height, width = image.shape[-2:]
    if not 1.9 <= width / height <= 2.1:
        warnings.warn(
            f"a full panorama is twice as wide as high, got {width} x {height}: it is taken as the whole sphere",
            stacklevel=2,
        )
    return image


def erp_to_views(erp: torch.Tensor, plan: ViewPlan, image_size: int) -> torch.Tensor:
    """Sample the views of a plan.

    A panorama with more detail than the views need is first reduced (mean over areas) to about twice their resolution
    and sampled at 2 x 2 places a pixel, so that nothing aliases; it wraps at the seam and goes on over the poles.

    Args:
        erp: [C, H, W], any range.
        plan: the views.
        image_size: side of the views in pixels.

    Returns:
        [V, C, image_size, image_size].
    """
    views: list[torch.Tensor] = [torch.empty(0)] * plan.num_views
    for kind, fov in sorted({(view.kind, view.fov) for view in plan.views}):
        indices = [index for index, view in enumerate(plan.views) if (view.kind, view.fov) == (kind, fov)]
        group = tuple(plan.views[index] for index in indices)
        source, samples = erp, 1
        if kind == "perspective":
            needed_width = 2 * math.pi * image_size / (2 * math.tan(math.radians(fov) / 2))
            samples = 2 if erp.shape[-1] >= 1.5 * needed_width else 1  # a side of each pixel
            source = _reduce(erp, samples * needed_width)
        else:
            needed = (image_size, round(image_size * 360 / fov))
            if erp.shape[-2] >= needed[0] and erp.shape[-1] >= needed[1]:
                source = F.interpolate(erp[None], size=needed, mode="area")[0]
        grid = _sampling_grid(group, samples * image_size, (source.shape[1], source.shape[2]))
        padded = _pad_sphere(source)  # [C, h + 2, w + 2]
        sampled = F.grid_sample(padded[None], grid, mode="bilinear", padding_mode="border", align_corners=True)
        if samples > 1:
            sampled = F.avg_pool2d(sampled, samples)
        for index, view in zip(indices, sampled[0].chunk(len(group), dim=1), strict=True):
            views[index] = view  # [C, image_size, image_size]
    return torch.stack(views)


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
        padded = _pad_sphere(values) if view.is_global else F.pad(values[None], (1, 1, 1, 1), mode="replicate")[0]
        place = np.stack([2 * (column + 1) / (columns + 1) - 1, 2 * (row + 1) / (rows + 1) - 1], -1)
        sampled = F.grid_sample(padded[None], torch.from_numpy(place).to(views)[None], align_corners=True)[0]
        painted += sampled * share
        total += share
    return painted / total.clamp(min=1e-12), total > 0


def _reduce(erp: torch.Tensor, needed_width: float) -> torch.Tensor:
    """Mean over k x k blocks, with the largest k that leaves the width that is needed and divides both sides. Where
    only a k of less than half of that divides them, areas of uneven size do, which moves pixels by up to a tenth."""
    height, width = erp.shape[-2:]
    largest = int(width / needed_width)
    k = max((k for k in range(1, largest + 1) if height % k == width % k == 0), default=1)
    if 2 * k <= largest:
        return F.interpolate(erp[None], size=(height // largest, width // largest), mode="area")[0]
    return erp if k == 1 else F.avg_pool2d(erp[None], k)[0]


def _pad_sphere(erp: torch.Tensor) -> torch.Tensor:
    """One more pixel all around, taken from where the sphere goes on: the other edge, or beyond the pole (the same
    row, half a turn away)."""
    half = erp.shape[-1] // 2
    erp = torch.cat([erp[:, :1].roll(half, -1), erp, erp[:, -1:].roll(half, -1)], dim=1)
    return torch.cat([erp[..., -1:], erp, erp[..., :1]], dim=2)


@lru_cache(maxsize=32)
def _sampling_grid(views: tuple[View, ...], image_size: int, source: tuple[int, int]) -> torch.Tensor:
    """Where the pixels of the views lie in a padded ERP source (h, w): for `grid_sample` with `align_corners=True`,
    [1, V * image_size, image_size, 2] in [-1, 1]."""
    height, width = source
    rays = np.concatenate([view.rays((image_size, image_size)) for view in views])
    row, column, _ = View("erp").cells(rays, source)
    grid = np.stack([2 * (column + 1) / (width + 1) - 1, 2 * (row + 1) / (height + 1) - 1], -1)
    return torch.from_numpy(grid.astype(np.float32))[None]


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for nested in images for image in _flatten(nested)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


PanoramaImageProcessor.register_for_auto_class("AutoImageProcessor")
