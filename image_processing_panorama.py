"""The image processor: an equirectangular (ERP) panorama in, the views of a plan out."""

import io
import logging
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

logger = logging.getLogger(__name__)

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor


class PanoramaImagesKwargs(ImagesKwargs, total=False):
    """Options of a call, beside those of every image processor."""

    image_size: int
    view_strategy: str
    fov_deg: float
    overlap_ratio: float
    pitch_rows: list[float]


class PanoramaImageProcessor(BaseImageProcessor):
    """ERP panoramas -> `pixel_values` [B, V, 3, H, W], normalised.

    Args:
        image_size: side of each view in pixels.
        view_strategy, fov_deg, overlap_ratio, pitch_rows: the plan of views, as in :class:`PanoramaConfig`.
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
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @property
    def view_plan(self) -> ViewPlan:
        """The views of one panorama."""
        return make_view_plan(self.view_strategy, self.fov_deg, self.overlap_ratio, tuple(self.pitch_rows))

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
        plan = make_view_plan(**{**plan_options, "pitch_rows": tuple(plan_options["pitch_rows"])})

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

    The panorama is first reduced (mean over areas) to about the resolution that the views need, so that bilinear
    sampling does not alias; it wraps around at the seam and goes on over the poles.

    Args:
        erp: [C, H, W], any range.
        plan: the views.
        image_size: side of the views in pixels.

    Returns:
        [V, C, image_size, image_size].
    """
    views: list[torch.Tensor] = [torch.empty(0)] * plan.num_views
    fields_of_view = sorted({view.fov for view in plan.views})
    for fov in fields_of_view:
        indices = [index for index, view in enumerate(plan.views) if view.fov == fov]
        group = tuple(plan.views[index] for index in indices)
        source = erp
        if group[0].kind == "erp":
            if min(erp.shape[-2:]) >= image_size:
                source = F.interpolate(erp[None], size=(image_size, image_size), mode="area")[0]
        else:
            source = _reduce(erp, 2 * math.pi * image_size / (2 * math.tan(math.radians(fov) / 2)))
        grid = _sampling_grid(group, image_size, (source.shape[1], source.shape[2]))
        padded = _pad_sphere(source)  # [C, h + 2, w + 2]
        sampled = F.grid_sample(padded[None], grid, mode="bilinear", padding_mode="border", align_corners=True)
        for index, view in zip(indices, sampled[0].chunk(len(group), dim=1), strict=True):
            views[index] = view  # [C, image_size, image_size]
    return torch.stack(views)


def _reduce(erp: torch.Tensor, needed_width: float) -> torch.Tensor:
    """Mean over k x k blocks, with the largest k that leaves the width that is needed."""
    height, width = erp.shape[-2:]
    k = int(width / needed_width)
    return erp if k < 2 else F.interpolate(erp[None], size=(height // k, width // k), mode="area")[0]


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
