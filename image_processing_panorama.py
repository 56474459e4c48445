"""The image processor: an equirectangular (ERP) panorama in, the views of a plan out."""

import hashlib
import inspect
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import FTPHandler, Request, build_opener

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .geometry_panorama import Direction, View, ViewOptions, ViewPlan, camera_rotation, check_direction
from .options_panorama import IMAGE_MEAN, IMAGE_STD, check_option_names, check_resembling_names
from .projections_panorama import Projection
from .reading_panorama import (
    MAX_PIXELS,
    ImageSource,
    content_digest,
    from_base64,
    load_file_bytes,
    open_image,
    read_panorama,
    read_photograph,
)
from .sampling_panorama import erp_to_views, needed_width, use_one_thread_in_a_worker, view_mask

logger = logging.getLogger(__name__)

READ_OPTIONS = ("strict_aspect", "align_heading", "level", "max_pixels", "projection")  # for :func:`read_panorama`
_CALL_OPTIONS = ("device", "yaw_offsets", "mirrored", "tilts", "further_views")
# What transformers writes into the file of a processor, or hands over with it; and the options of image processors that
# resize, crop and rescale, which have no effect here.
_TRANSFORMERS_OPTIONS = (
    "_processor_class",
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    *ImagesKwargs.__annotations__,
)
LARGEST_DOWNLOAD = 256 * 2**20  # bytes behind a URL
LONGEST_DOWNLOAD_S = 60.0
_SHORTEST_BASE64 = 64  # characters of a text that may hold a file
_CACHE_VERSION = 2  # to be raised when the same file and options give other views


class Shown(NamedTuple):
    """How a panorama is shown: turned, then mirrored, then tilted.

    Attributes:
        yaw_offset: degrees to the right of its front that become the front.
        mirrored: whether left and right are exchanged.
        tilt: pitch and roll in degrees of a camera that was not level: looking up, and leaning to the right.
    """

    yaw_offset: float = 0.0
    mirrored: bool = False
    tilt: tuple[float, float] = (0.0, 0.0)


AS_IT_IS = Shown()


class PanoramaImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of a call, beside those of every image processor."""

    image_size: int
    view_strategy: str
    fov_deg: float
    overlap_ratio: float
    pitch_rows: list[float]
    pole_caps: bool
    strict_aspect: bool
    align_heading: bool
    level: bool
    min_seen: float
    max_pixels: int
    projection: str
    yaw_offsets: list[float]
    mirrored: list[bool]
    tilts: list[Any]
    further_views: list[Any]
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
        level: level panoramas whose Photo Sphere data say how their camera was tilted (pitch and roll), as viewers do.
        min_seen: the share of a view, in [0, 1), that must show something the camera saw; views that show less are left
            out (`view_mask`). Where no view shows as much, those count that show most.
        max_pixels: the most pixels that are held while a file is decoded (4 bytes each in most formats), or that a
            sphere has of which a file shows a part: beyond it an image is refused. A JPEG that is not progressive is
            reduced while it is decoded, and counts with what is left.
        projection: what the images are, where they are not equirectangular: `"cubemap_3x2"`, `"cubemap_6x1"`,
            `"dual_fisheye:fov=190"`, `"cylindrical"`, `"stereo_side_by_side"`, `"stereo_top_bottom"`, `"vr180"`, with
            the options of :class:`Projection`; `"equirectangular"` where they are and do not look like it. Without it
            a picture of 2:1 that clearly is something else is warned of, and refused with `strict_aspect`.
        cache_dir: a folder that keeps prepared views (as uint8, to half a grey level) for the next time; keyed by the
            content of the file and by every option that changes views. Not saved with the processor.
    """

    model_input_names = ["pixel_values", "view_mask"]
    valid_kwargs = PanoramaImageProcessorKwargs

    def __init__(
        self,
        *,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        strict_aspect: bool = False,
        align_heading: bool = False,
        level: bool = True,
        min_seen: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        projection: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        given = {name: kwargs.pop(name) for name in ViewOptions.names() if name in kwargs}
        self._check_names(kwargs, self.option_names())
        super().__init__(**kwargs)
        for name, value in asdict(ViewOptions(**given)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        check_min_seen(min_seen)
        if min(image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {list(image_std)}. Typical value: [0.5, 0.5, 0.5]")
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.strict_aspect = strict_aspect
        self.align_heading = align_heading
        self.level = level
        self.min_seen = min_seen
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be positive, got {max_pixels}. Typical value: {MAX_PIXELS}")
        self.max_pixels = max_pixels
        Projection.parse(projection)
        self.projection = projection
        self.cache_dir = cache_dir

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options."""
        own = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
        return (*ViewOptions.names(), *own)

    @classmethod
    def _check_names(cls, given: dict[str, Any], own: Sequence[str]) -> None:
        """Refuse options that neither this class nor transformers has, and warn of those that only transformers has."""
        check_option_names((name for name in given if name not in _TRANSFORMERS_OPTIONS), own, cls.__name__)
        for name, value in given.items():
            if name in ImagesKwargs.__annotations__ and name not in own and value is not None:
                warnings.warn(f"{name} has no effect on {cls.__name__}", stacklevel=3)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `ImageProcessingMixin.from_dict`. What resembles an option among `kwargs` is checked as on construction,
        the rest is for other classes. What a file holds that is not known is kept, with a warning."""
        known = {*cls.option_names(), *_TRANSFORMERS_OPTIONS}
        check_resembling_names((name for name in kwargs if name not in known), cls.option_names(), cls.__name__)
        foreign = {name: value for name, value in image_processor_dict.items() if name not in known}
        if foreign:
            _warn_of_foreign_keys(tuple(sorted(foreign)))
        own = {name: value for name, value in image_processor_dict.items() if name in known}
        processor = super().from_dict(own, **kwargs)
        for name, value in foreign.items():
            setattr(processor[0] if isinstance(processor, tuple) else processor, name, value)
        return processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """As `ImageProcessingMixin.from_json_file`, but what is not known is kept, as by :meth:`from_dict`."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but `cache_dir`, which belongs to a machine."""
        return {name: value for name, value in super().to_dict().items() if name != "cache_dir"}

    @property
    def view_plan(self) -> ViewPlan:
        """The views of one panorama."""
        return ViewOptions(**{name: getattr(self, name) for name in ViewOptions.names()}).plan

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Fetch the bytes of what a URL names, and those that a data URL or base64 holds; all else stays as it is, for
        :func:`read_panorama` to open, so that each way in gives the same pixels. Lists keep their nesting.

        Private addresses are asked like public ones: who hands on URLs of strangers looks at them first, or fetches
        them by `panorama_vlm.data.fetching.fetch`, which asks public addresses alone.

        Raises:
            ValueError: for a data URL that cannot be decoded; of its text, which may be long, only the head is
                repeated. For a URL that gives nothing, more than 256 MiB, or takes more than 60 s.
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if not isinstance(image_url_or_urls, str):
            return image_url_or_urls
        if image_url_or_urls.startswith("data:"):
            return from_base64(image_url_or_urls)
        if image_url_or_urls.startswith(("http://", "https://")):
            return _fetched(image_url_or_urls)
        return _from_base64(image_url_or_urls) or image_url_or_urls

    def preprocess(
        self, images: ImageSource | Sequence[Any], *, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Cut panoramas into views.

        Args:
            images: a panorama, or a list of them, nested or not; B in all, in reading order. Each is a path, bytes, a
                file object, a URL (http, https, data), base64, a PIL image, a row of a `datasets.Image` column, or an
                array or tensor [H, W, 3], [3, H, W] or [H, W] (with alpha, too), of uint8, uint16, or float in [0, 1].
                Sizes may differ.
            return_tensors: `"pt"` or `"np"`; without it lists of B tensors.
            kwargs: any option of the constructor, for this call alone (`None` for that of the processor);
                `yaw_offsets`, degrees to the right of the front of each panorama that become its front; `mirrored`,
                for each panorama whether left and right are exchanged after that, and `tilts`, `(pitch, roll)` in
                degrees of a camera that was not level (looking up, and leaning to the right), after both;
                `further_views`, for each panorama a list of `(yaw, pitch, fov)` in degrees of perspective views beside
                those of the plan, such as a closer look; `device`, where the views are made and returned.

        Returns:
            `pixel_values` [B, V, 3, image_size, image_size], and where a panorama is partial `view_mask` [B, V], false
            for a view of which less than `min_seen` shows something the camera saw. With `further_views` there are E
            more, the most that a panorama has, and `further_views` [B, E, 3] says where they look, NaN where a panorama
            has fewer.

        Raises:
            ValueError: for a panorama that cannot be read or is not what an option asks for, it is named; for an option
                that does not exist.
        """
        use_one_thread_in_a_worker(os.getpid())
        _keep_working_memory()
        self._check_names(kwargs, (*self.option_names(), *_CALL_OPTIONS))
        options = {name: getattr(self, name) for name in self.option_names()}
        options |= {name: value for name, value in kwargs.items() if value is not None and name in options}
        view_options = ViewOptions(**{name: options[name] for name in ViewOptions.names()})
        check_min_seen(options["min_seen"])
        sources = flatten_images(images)
        shown = check_shown(kwargs, len(sources))
        further = check_further_views(kwargs.get("further_views"), len(sources))

        size = view_options.image_size
        device = torch.device(kwargs.get("device") or "cpu")
        planned, most = view_options.plan.num_views, max(map(len, further), default=0)
        pixel_values = _empty((len(sources), planned + most, 3, size, size), device)
        masks: list[torch.Tensor] = []
        made: dict[Any, int] = {}  # questions about one panorama that come together name it again
        for number, (source, how, own, views) in enumerate(zip(sources, shown, further, pixel_values, strict=True)):
            key = (source, how) if isinstance(source, str) and not own else number
            first = made.setdefault(key, number)
            if first < number:
                views.copy_(pixel_values[first])
                masks.append(masks[first])
            else:
                masks.append(self._make_views(self.fetch_images(source), view_options, options, how, own, views))
        mean, std = (
            255 * torch.tensor(options[name], device=device).view(3, 1, 1) for name in ("image_mean", "image_std")
        )
        for views in pixel_values:  # a few MB at a time, which fit into a cache
            views.sub_(mean).div_(std)
        for own, views in zip(further, pixel_values, strict=True):
            views[planned + len(own) :] = 0
        data: dict[str, Any] = {"pixel_values": pixel_values if return_tensors else list(pixel_values)}
        if not all(bool(mask.all()) for mask in masks):
            data["view_mask"] = masks
        if most:
            absent = [(float("nan"),) * 3]
            rows = [torch.tensor(own + absent * (most - len(own)), device=device) for own in further]
            data["further_views"] = torch.stack(rows) if return_tensors else rows
        return BatchFeature(data, tensor_type=return_tensors)

    def photographs(self, images: Any) -> torch.Tensor:
        """Photographs as a camera takes them (no panoramas) as single views, for :meth:`PanoramaVLM.get_view_features`.

        Args:
            images: as :meth:`preprocess` takes panoramas, N in all. Of each the middle square is taken.

        Returns:
            [N, 3, image_size, image_size], normalised.

        Raises:
            ValueError: for a photograph that cannot be read; it is named.
        """
        size = (self.image_size, self.image_size)
        read = [read_photograph(source, self.max_pixels) for source in self.fetch_images(flatten_images(images))]
        levels = [each if each.dtype == torch.uint8 else (255 * each).round().byte() for each in read]
        pictures = [Image.fromarray(each.cpu().numpy()) for each in levels]
        squares = [np.asarray(ImageOps.fit(each, size, Image.Resampling.BICUBIC)) for each in pictures]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255  # [N, 3, image_size, image_size]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def _make_views(
        self,
        source: Any,
        views: ViewOptions,
        options: dict[str, Any],
        shown: Shown,
        further: list[tuple[float, float, float]],
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Write the views of one panorama, in [0, 255], into `out` [V or more, 3, image_size, image_size]; from the
        cache where there is one, no further views and no tilt. Returns its mask [V]."""
        if options["cache_dir"] is None or further or any(shown.tilt):
            return _sample_views(source, views, options, shown, further, out)
        source = load_file_bytes(source)
        kept_out = ("cache_dir", "image_std", "max_pixels")
        key = {name: value for name, value in options.items() if name not in kept_out} | asdict(views)
        if isinstance(source, dict) and source.get("projection"):
            key["projection"] = source["projection"]
        key |= {"mirrored": True} if shown.mirrored else {}
        text = json.dumps([_CACHE_VERSION, content_digest(source), shown.yaw_offset, key], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        file = Path(options["cache_dir"], name[:2], f"{name}.safetensors")
        stored = _read_prepared(file)
        if stored is None:
            out = out[: views.plan.num_views]
            mask = _sample_views(source, views, options, shown, [], out)
            stored = {"views": out.round().to("cpu", torch.uint8), "mask": mask}
            _keep_prepared(stored, file)
        out[: len(stored["views"])].copy_(stored["views"])
        return stored["mask"]


@cache
def _keep_working_memory() -> None:
    """See that what one panorama takes (20 MiB) is there for the next one. glibc gives back what is freed beyond twice
    the largest block that was: it is luck else, and new pages cost up to a third of the time."""
    np.empty(31 << 20, np.uint8)  # no page of it is touched


def _keep_prepared(stored: dict[str, torch.Tensor], file: Path) -> None:
    """Put prepared views into the cache; one that is full or cannot be written costs only time."""
    unfinished = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as unfinished:
            pass
        save_file(stored, unfinished.name)
        os.replace(unfinished.name, file)
    except (OSError, SafetensorError) as error:
        if unfinished is not None:
            Path(unfinished.name).unlink(missing_ok=True)
        _warn_of_the_cache(str(file.parent.parent), str(error).replace(str(file.parent), "…"))


@cache
def _warn_of_the_cache(folder: str, reason: str) -> None:
    words = f"cannot keep prepared views in cache_dir={folder!r} ({reason}): they are made anew each time"
    warnings.warn(words, stacklevel=2)


def check_min_seen(share: float) -> None:
    """See that a share of a view can be one.

    Raises:
        ValueError: where it cannot.
    """
    if not 0 <= share < 1:
        raise ValueError(f"min_seen must be in [0, 1), got {share}. Typical value: 0.01")


def check_shown(given: dict[str, Any], panoramas: int) -> list[Shown]:
    """How each panorama is shown, by the options of a call.

    Raises:
        ValueError: for lists that are not one a panorama, or a tilt that cannot be.
    """
    names = ("yaw_offsets", "mirrored", "tilts")
    values = [given.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and len(value) != panoramas:
            each = {"yaw_offsets": "one angle", "mirrored": "true or false", "tilts": "(pitch, roll)"}[name]
            raise ValueError(f"{name} must name {each} a panorama, got {len(value)} for {panoramas}")
    yaw_offsets, mirrored, tilts = values
    for tilt in tilts or ():
        if len(tilt) != 2 or not all(abs(angle) <= 180 for angle in tilt):
            raise ValueError(f"a tilt must be (pitch, roll) in [-180, 180] degrees, got {tilt!r}. Typical: (3, -2)")
    return [
        Shown(
            0.0 if yaw_offsets is None else float(yaw_offsets[index]),
            mirrored is not None and bool(mirrored[index]),
            (0.0, 0.0) if tilts is None else (float(tilts[index][0]), float(tilts[index][1])),
        )
        for index in range(panoramas)
    ]


def check_further_views(further: Any, panoramas: int) -> list[list[Direction]]:
    """The further views of each panorama.

    Raises:
        ValueError: for lists that are not one a panorama, or a view that cannot be.
    """
    if further is None:
        return [[]] * panoramas
    if len(further) != panoramas:
        raise ValueError(f"further_views must be a list for each panorama, got {len(further)} for {panoramas}")
    return [[check_direction(view, "further view") for view in of_one] for of_one in further]


def _sample_views(
    source: Any,
    views: ViewOptions,
    options: dict[str, Any],
    shown: Shown,
    further: list[tuple[float, float, float]],
    out: torch.Tensor,
) -> torch.Tensor:
    """Read one panorama and write its views, and the further ones, in [0, 255], into the first of `out`. Returns the
    mask [V] of the views of the plan."""
    plan = ViewPlan((*views.plan.views, *(View("perspective", *each) for each in further)))
    out = out[: plan.num_views]
    panorama = read_panorama(
        source,
        needed_width(plan, views.image_size),
        fill=options["image_mean"],
        yaw_offset=shown.yaw_offset,
        mirrored=shown.mirrored,
        resample=False,
        **{name: options[name] for name in READ_OPTIONS},
    )
    pixels, rotation = panorama.pixels.to(out.device), panorama.rotation
    if any(shown.tilt):
        rotation = (np.eye(3) if rotation is None else rotation) @ camera_rotation(*shown.tilt)
    erp_to_views(pixels.permute(2, 0, 1), plan, views.image_size, out=out, rotation=rotation)
    if pixels.is_floating_point():
        out.mul_(255)
    return view_mask(views.plan, panorama.covered, rotation, panorama.seen, options["min_seen"])


class _NoFTP(FTPHandler):
    """Redirects lead to http and https alone; urllib itself refuses all else."""

    def ftp_open(self, req: Request) -> Any:
        raise URLError("it leads to an ftp URL")


def _fetched(url: str) -> bytes:
    """The content behind a URL. It is the caller's: it may be of a private host, as in `load_image` of transformers."""
    pieces, size, end = list[bytes](), 0, time.monotonic() + LONGEST_DOWNLOAD_S
    try:
        request = Request(url, headers={"User-Agent": "panorama-vlm", "Accept": "image/*"})  # noqa: S310 - http alone
        with build_opener(_NoFTP).open(request, timeout=20) as answer:
            while piece := answer.read1(2**16):  # what has come by now: a slow server cannot hold us
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST_DOWNLOAD:
                    raise ValueError(f"it has more than {LARGEST_DOWNLOAD // 2**20} MiB; fetch it, and give the file")
                if time.monotonic() > end:
                    raise ValueError(f"it took more than {LONGEST_DOWNLOAD_S:g} s; fetch it, and give the file")
            if answer.length:
                raise ValueError(f"it ends {answer.length} bytes early")
            return b"".join(pieces)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"cannot read {url[:200]}: {type(error).__name__}: {str(error)[:200]}") from error


def _from_base64(text: str) -> bytes | None:
    """The file that a text without `data:` holds, as transformers takes it; `None` where it is something else."""
    if len(text) < _SHORTEST_BASE64 or os.path.exists(text):
        return None
    try:
        data = from_base64(text)
        open_image(data).close()
    except ValueError:  # a path, as a rule
        return None
    return data


def _read_prepared(file: Path) -> dict[str, torch.Tensor] | None:
    """Views and mask that an earlier call has kept, `None` where there are none that can be read."""
    try:
        return load_file(file)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        logger.warning("Prepared views in %s cannot be read and are made again: %s", file, error)
        return None


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if device.type == "cpu":  # numpy asks Linux for huge pages, torch does not; new memory is slow
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


@cache
def _warn_of_foreign_keys(names: tuple[str, ...]) -> None:
    warnings.warn(f"the image processor holds {', '.join(names)}, not known here: kept as they are", stacklevel=4)


def join_views(each: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What was made of panoramas by themselves as one batch.

    Args:
        each: `pixel_values` [panoramas, V + E, 3, H, W], where there are some `further_views` [panoramas, E, 3], and
            where one is partial `view_mask` [panoramas, V]; all of one plan, E may differ.

    Returns:
        The same of all, as :meth:`PanoramaImageProcessor.preprocess` gives it; nothing of nothing.
    """
    if not each:
        return {}
    most = max(one["pixel_values"].shape[1] for one in each)
    pixels, further, masks = [], [], []
    for one in each:
        views = one["pixel_values"]
        own = one.get("further_views", torch.full((len(views), 0, 3), torch.nan, device=views.device))
        planned, missing = views.shape[1] - own.shape[1], most - views.shape[1]
        pixels.append(torch.nn.functional.pad(views, (0, 0, 0, 0, 0, 0, 0, missing)))
        further.append(torch.nn.functional.pad(own, (0, 0, 0, missing), value=torch.nan))
        masks.append(one.get("view_mask", torch.ones(len(views), planned, dtype=torch.bool, device=views.device)))
    batch = {"pixel_values": torch.cat(pixels)}
    if any("further_views" in one for one in each):
        batch["further_views"] = torch.cat(further)
    if any("view_mask" in one for one in each):
        batch["view_mask"] = torch.cat(masks)
    return batch


def flatten_images(images: Any) -> list[Any]:
    """Panoramas in reading order, of one, of lists of them, nested or not, or of arrays [B, H, W, 3]."""
    if isinstance(images, list | tuple):
        return [image for nested in images for image in flatten_images(nested)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


PanoramaImageProcessor.register_for_auto_class("AutoImageProcessor")
