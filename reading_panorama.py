"""Reading: whatever holds a panorama in, its pixels on the whole sphere out."""

import base64
import hashlib
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from .cylinder_panorama import unrolled
from .geometry_panorama import camera_rotation, yaw_rotation
from .options_panorama import IMAGE_MEAN
from .photo_sphere_panorama import PhotoSphere, photo_sphere_of, tiff_position_tags, with_tiff_position, xmp_packets
from .sampling_panorama import rotated_pixels

try:  # takes less time and memory for a JPEG; Pillow gives the same pixels
    import simplejpeg
except ImportError:
    simplejpeg = None

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | dict[str, Any] | Image.Image | np.ndarray | torch.Tensor

MAX_SIDE = 32_767  # pixels; what OpenCV's remap can address
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000", "BMP", "PPM")
_SAME_FORMAT = {"MPO": "JPEG"}  # several JPEGs in one file: what phones write
_MAGIC = {b"GIF8": "a GIF", b"%PDF": "a PDF", b"<svg": "an SVG", b"<!DO": "a web page", b"<htm": "a web page"}
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_NAME = "panorama_name"  # attribute of an image, for messages: Pillow would map the file that `filename` names
_PROJECTIONS = ("equirectangular", "cylindrical")  # of Photo Sphere data
_LEFT_RIGHT = np.diag([-1.0, 1.0, 1.0])
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


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


def open_image(source: Any) -> Any:
    """Open what names or holds a file, without decoding it; PIL images, arrays and tensors stay.

    Args:
        source: a path, bytes, a file object, or a row of a `datasets.Image` column (`{"bytes": ..., "path": ...}`).

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for a file that is no image of a format panoramas come in; the file and the reason are named.
    """
    if isinstance(source, dict):
        if not source.get("bytes") and not source.get("path"):
            raise ValueError(f"an image given as a dict needs 'bytes' or 'path', got the keys {sorted(source)}")
        name = source.get("path")
        return _open(io.BytesIO(source["bytes"]) if source.get("bytes") else str(name), str(name or "image in bytes"))
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(io.BytesIO(source), "image in bytes")
    if isinstance(source, str | os.PathLike):
        return _open(os.fspath(source), os.fspath(source))
    if hasattr(source, "read") and hasattr(source, "seek"):
        source.seek(0)
        return _open(source, str(getattr(source, "name", "image in a file object")))
    return source


def from_base64(text: str) -> bytes:
    """The bytes of a file in base64, with or without `data:TYPE;base64,` before it.

    Raises:
        ValueError: for what is no base64, and for a data URL in another form; of its text, which may be long, only the
            head is repeated.
    """
    head, comma, data = str(text).partition(",")
    if not head.startswith("data:"):
        head, data = "no data URL", str(text)
    elif not comma or not head.lower().endswith(";base64"):
        raise ValueError(f"cannot read a data URL that begins with {str(text)[:60]!r}: it must be in base64")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"cannot read base64 of {len(data)} characters ({head[:60]!r}): {error}") from None


def read_panorama(
    source: ImageSource,
    needed_width: float = math.inf,
    *,
    fill: Sequence[float] = IMAGE_MEAN,
    strict_aspect: bool = False,
    align_heading: bool = False,
    yaw_offset: float = 0.0,
    mirrored: bool = False,
    level: bool = True,
    resample: bool = True,
) -> Panorama:
    """Decode a panorama, no larger than it has to be, and place it on the sphere.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where this leaves `needed_width`. The data of a Photo Sphere say
    which part of the sphere the image shows. Without them an image twice as wide as high is the whole sphere, and any
    other is taken as a band around the horizon (or, where it is higher, around the front) of the same degrees a pixel.

    Args:
        source: see :func:`open_image`, or a PIL image, an array or a tensor: [H, W], [H, W, 1, 3 or 4] or
            [1, 3 or 4, H, W], of uint8, uint16, or float in [0, 1].
        needed_width: pixels around the whole sphere that its user needs.
        fill: for what the camera did not see, and behind what is transparent, in [0, 1].
        strict_aspect: raise `ValueError` instead of a guess where nothing says which part of the sphere is shown.
        align_heading: turn the panorama so that its front looks north, where it says where north is.
        yaw_offset: degrees to the right of the front (or of north) that become the front.
        mirrored: exchange left and right after that.
        level: level a panorama whose camera was not, by the pitch and roll of its Photo Sphere data.
        resample: whether its pixels are resampled for this; else :attr:`Panorama.rotation` says how they lie.

    Raises:
        TypeError: for what is no image.
        ValueError: for a file that is broken or too large, a shape or type that is no image, float values outside
            [0, 1]; the file and the reason are named.
    """
    image = open_image(source)
    sphere, name, size = None, "the panorama", None
    if isinstance(image, Image.Image):
        name, is_ours = _name(image), image is not source
        try:
            size = image.size
            _check_size(name, size)
            sphere = read_photo_sphere(image)
            _check_projection(sphere)
            pixels, seen = _decode(image, needed_width, sphere, fill, is_ours)
        except _BROKEN as error:
            raise ValueError(f"cannot read {name}: {str(error).removeprefix(f'cannot read {name}: ')}") from error
        finally:
            if is_ours and not hasattr(source, "read"):  # a file object stays open for its owner
                image.close()
    elif isinstance(image, np.ndarray | torch.Tensor):
        pixels, seen = _from_array(image, fill)
        _check_size(name, (pixels.shape[1], pixels.shape[0]))
    else:
        raise TypeError(
            "a panorama must be a path, bytes, a file object, a PIL image, an array or a tensor, got "
            f"{type(image).__name__}"
        )
    if sphere is not None and sphere.projection == "cylindrical":
        pixels, seen, sphere = _from_cylinder(pixels, seen, sphere, strict_aspect, name)
    panorama = _place(pixels, seen, sphere, needed_width, fill, strict_aspect, name, size)
    if align_heading and sphere is not None and sphere.heading is not None:
        yaw_offset -= sphere.heading
    if level and sphere is not None and (sphere.pitch or sphere.roll):
        panorama = replace(panorama, rotation=camera_rotation(sphere.pitch, sphere.roll).T)
    panorama = _turn(panorama, yaw_offset) if yaw_offset % 360 else panorama
    panorama = _mirror(panorama) if mirrored else panorama
    return _resample(panorama) if resample and panorama.rotation is not None else panorama


def to_erp_tensor(source: ImageSource) -> torch.Tensor:
    """The whole panorama as float32 [3, H, W] in [0, 1]; see :func:`read_panorama`."""
    pixels = read_panorama(source).pixels.permute(2, 0, 1)
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def read_photo_sphere(image: Image.Image) -> PhotoSphere | None:
    """The Photo Sphere data of an opened image, or what the tags of a TIFF say in their place; `None` where it has
    none. What cannot be understood is warned about."""
    sphere = photo_sphere_of(xmp_packets(image), _name(image))
    return with_tiff_position(sphere, image, _name(image))


def load_file_bytes(source: Any) -> Any:
    """What names a file, as a row with its bytes and its path (see :func:`open_image`), so that who needs them twice
    reads the file once; anything else as it is.

    Raises:
        OSError: for a file that does not exist or cannot be opened; it is named.
    """
    if isinstance(source, dict) and not source.get("bytes") and source.get("path"):
        source = str(source["path"])
    if isinstance(source, str | os.PathLike):
        return {"bytes": Path(source).read_bytes(), "path": os.fspath(source)}
    return source


def content_digest(source: Any) -> str:
    """SHA-256 of what an image source holds: of the file where there is one, else of the pixels."""
    source = load_file_bytes(source)
    data: Any
    if isinstance(source, dict):
        data = source["bytes"]
    elif isinstance(source, Image.Image) and _is_lazy(source):
        source.fp.seek(0)  # type: ignore[attr-defined]
        data = source.fp.read()  # type: ignore[attr-defined]
    elif isinstance(source, Image.Image):
        palette = None if source.palette is None else source.getpalette("RGBA")
        seen = (palette, source.info.get("transparency"), xmp_packets(source), tiff_position_tags(source))
        header = f"{source.mode} {source.size} {dict(source.getexif())} {seen!r}"
        data = header.encode() + source.tobytes()
    elif isinstance(source, np.ndarray | torch.Tensor):
        array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source
        data = f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
    elif hasattr(source, "read"):
        source.seek(0)
        data = source.read()
    else:
        data = source
    return hashlib.sha256(data).hexdigest()


# Files


def _open(file: str | BinaryIO, name: str) -> Image.Image:
    Image.init()
    try:
        image = Image.open(file, formats=[format for format in _FORMATS if format in Image.OPEN])
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"cannot read {name}: {_what_is_it(file)}") from error
    except _BROKEN as error:
        raise ValueError(f"cannot read {name}: {error}") from error
    promised = Image.registered_extensions().get(Path(name).suffix.lower())
    if promised is not None and _family(promised) != _family(image.format):
        words = f"{name} is named as {_family(promised)}, but holds {_family(image.format)}: read as what it holds"
        warnings.warn(words, stacklevel=3)
    setattr(image, _NAME, name)
    return image


def _family(format: str | None) -> str | None:
    return _SAME_FORMAT.get(format or "", format)


def _what_is_it(file: str | BinaryIO) -> str:
    """Why PIL knows no image in it."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            head = opened.read(16)
    else:
        file.seek(0)
        head = file.read(16)
    if not head:
        return "it is empty"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return "it is HEIC: pip install pillow-heif and call pillow_heif.register_heif_opener()"
    kinds = [kind for magic, kind in _MAGIC.items() if head.startswith(magic)]
    readable = ", ".join(_FORMATS)
    return (
        f"it holds {kinds[0]}, not one of {readable}" if kinds else f"it is none of {readable}, or its head is broken"
    )


def _name(image: Image.Image) -> str:
    return str(getattr(image, _NAME, "") or getattr(image, "filename", "") or "the panorama")


def _check_size(name: str, size: tuple[int, int]) -> None:
    if max(size) > MAX_SIDE or min(size) < 1:
        raise ValueError(f"cannot read {name}: it is {size[0]} x {size[1]} pixels, a side must have 1 to {MAX_SIDE}")


def _is_lazy(image: Image.Image) -> bool:
    """Whether an image is opened, but not decoded yet."""
    return bool(getattr(image, "tile", None)) and getattr(image, "fp", None) is not None


def _decode(
    image: Image.Image, needed_width: float, sphere: PhotoSphere | None, fill: Sequence[float], is_ours: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixels [H, W, 3] of an image, and what of it is seen, as :func:`_from_array`; a JPEG that is not decoded yet is
    decoded small. `is_ours`: whether nobody else will look at it."""
    if _family(image.format) == "JPEG" and _is_lazy(image):
        scale = _jpeg_scale(image, needed_width, sphere)
        width, height = image.width // scale, image.height // scale
        file: BinaryIO = image.fp  # type: ignore[attr-defined]
        file.seek(0)
        if simplejpeg is not None and image.mode in ("L", "RGB") and _orientation(image) == 1:
            try:
                return torch.from_numpy(simplejpeg.decode_jpeg(file.read(), min_height=height, min_width=width)), None
            except ValueError:  # where the least is wrong; whether it can be read, Pillow decides
                file.seek(0)
        if not is_ours:  # opened a second time: the one that was handed in would be small for its owner, too
            image = Image.open(file, formats=["JPEG"])
        image.draft(image.mode, (width, height))
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _from_array(np.array(image).astype(np.uint16), fill)
    if image.mode == "I":  # 16 bit as well, in formats that PIL widens
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values must be in [0, 65535], they are in [{values.min()}, {values.max()}]")
        return _from_array(values.astype(np.uint16), fill)
    if image.mode == "F":
        return _from_array(np.array(image), fill)
    if image.has_transparency_data:
        return _from_array(np.array(image.convert("RGBA")), fill)
    image = image if image.mode == "RGB" else image.convert("RGB")
    pixels = torch.empty(image.height, image.width, 3, dtype=torch.uint8)
    for top in range(0, image.height, 256):  # rows at a time: PIL makes two copies of what it hands over
        bottom = min(top + 256, image.height)
        pixels.numpy()[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels, None


def _jpeg_scale(image: Image.Image, needed_width: float, sphere: PhotoSphere | None) -> int:
    """8, 4, 2 or 1: what a JPEG may be reduced by."""
    sides = [*image.size]
    full_width = 2 * sides[0] if _orientation(image) >= 5 else max(sides[0], 2 * sides[1])
    if sphere is not None and sphere.full is not None:
        sides += [*sphere.full, *(sphere.crop or ()), sphere.top, sphere.left]
        full_width = sphere.full[1]
    scales = (s for s in (8, 4, 2) if full_width / s >= needed_width and all(side % s == 0 for side in sides))
    return next(scales, 1)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 is upright, from 5 on the image lies on its side."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


# Arrays


def _from_array(image: np.ndarray | torch.Tensor, fill: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixels [H, W, 3], uint8 or float32 in [0, 1], and what of them is not fully transparent, bool [H, W]; `None`
    where that is all."""
    given = image.dtype
    is_uint16 = given == torch.uint16
    if isinstance(image, np.ndarray):  # torch knows no big-endian numbers, and few operations on uint16
        is_uint16 = image.dtype.kind == "u" and image.dtype.itemsize == 2
        native = np.dtype(np.int32) if is_uint16 else image.dtype.newbyteorder("=")
        image = torch.from_numpy(np.ascontiguousarray(image, native))
    elif is_uint16:
        image = image.to(torch.int32)
    shape = list(image.shape)
    if image.ndim == 2:
        image = image[..., None]
    elif image.ndim == 3 and shape[0] in (1, 3, 4) and shape[-1] not in (1, 3, 4):
        image = image.permute(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise ValueError(f"a panorama must have the shape [H, W, 3], [3, H, W] or [H, W], got {shape}")
    if image.is_floating_point():
        image = image.float()
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"a float panorama must have values in [0, 1], got [{low:g}, {high:g}]")
    elif image.dtype != torch.uint8:
        if not is_uint16:
            raise ValueError(f"a panorama must be of dtype uint8, uint16 or float, got {given}")
        image = image.float() / 65535
    seen = None
    if image.shape[-1] == 4:
        alpha = image[..., 3]
        if float(alpha.min()) == 0:
            seen = alpha > 0
            if not seen.any():
                raise ValueError("all of it is transparent: there is nothing to see")
        image = _over_fill(image, fill)
    return image.expand(-1, -1, 3).contiguous(), seen


def _over_fill(image: torch.Tensor, fill: Sequence[float]) -> torch.Tensor:
    """[H, W, 4] -> [H, W, 3], transparent parts filled."""
    colours, alpha = image[..., :3], image[..., 3:]
    opaque = 255 if image.dtype == torch.uint8 else 1
    if bool((alpha == opaque).all()):
        return colours
    share = alpha.float() / opaque
    mixed = colours.float() * share + opaque * torch.tensor(fill, device=image.device) * (1 - share)
    return (mixed.round() if image.dtype == torch.uint8 else mixed).to(image.dtype)


# The sphere


def _check_projection(sphere: PhotoSphere | None) -> None:
    if sphere is not None and sphere.projection not in _PROJECTIONS:
        read = " and ".join(_PROJECTIONS)
        words = f"its Photo Sphere data say that its projection is {sphere.projection!r}, read are {read}"
        raise ValueError(f"{words}; convert it, or correct ProjectionType where it is wrong")


def _from_cylinder(
    pixels: torch.Tensor, seen: torch.Tensor | None, sphere: PhotoSphere, strict_aspect: bool, name: str
) -> tuple[torch.Tensor, torch.Tensor | None, PhotoSphere]:
    """A cylindrical image as the part of the equirectangular one that it covers, and where this lies."""
    height, width = pixels.shape[:2]
    turn, left, horizon = width, 0, height / 2
    crop, full = sphere.crop or sphere.full or (0, 0), sphere.full or (0, 0)
    scale = width / crop[1] if min(crop) > 0 else 0.0
    if scale and abs(height / crop[0] / scale - 1) <= 0.02 and 0 <= sphere.left <= full[1] - crop[1]:
        turn, left = round(full[1] * scale), round(sphere.left * scale)
        below_the_top = full[0] / 2 - sphere.top
        if abs(below_the_top - crop[0] / 2) > 0.5:  # else it is the middle, but for a row that cannot be halved
            horizon = below_the_top * scale
    else:
        problem = f"the Photo Sphere data of {name} say that it is cylindrical, and not where its pixels lie"
        if strict_aspect:
            raise ValueError(
                f"{problem}; write GPano data into the file, or use strict_aspect=False to take it as a turn"
            )
        warnings.warn(f"{problem}: taken as a whole turn around the horizon", stacklevel=3)
    if turn > MAX_SIDE:
        raise ValueError(f"cannot read {name}: the whole turn has {turn} columns, at most {MAX_SIDE} are allowed")
    rows, top, sphere_height = unrolled(pixels, horizon, turn)
    if seen is not None:
        seen = unrolled(seen[..., None].float(), horizon, turn)[0][..., 0] >= 0.5
    full = (sphere_height, turn)
    return rows, seen, replace(sphere, full=full, crop=(len(rows), width), top=top, left=left)


def _place(
    pixels: torch.Tensor,
    seen: torch.Tensor | None,
    sphere: PhotoSphere | None,
    needed_width: float,
    fill: Sequence[float],
    strict_aspect: bool,
    name: str,
    size: tuple[int, int] | None,
) -> Panorama:
    """Pixels [h, w, 3], and what of them is seen, at their place on the whole sphere; `size` is (width, height) of the
    file, for messages."""
    height, width = pixels.shape[:2]
    area = _area_of(sphere, height, width, name)
    if area is None:
        area = _middle_of_the_sphere(height, width)
        if area is None:
            return Panorama(pixels, seen=seen)
        degrees = f"{360 * width / area[1]:.0f} x {180 * height / area[0]:.0f}"
        shown = size or (width, height)
        if (shown[0] < shown[1]) != (width < height):  # it was turned upright
            shown = shown[::-1]
        problem = f"{name} is {shown[0]} x {shown[1]} pixels, not 2:1, and has no Photo Sphere data"
        if strict_aspect:
            raise ValueError(
                f"{problem}; give a whole panorama, write GPano data into the file, or use strict_aspect=False to take "
                f"it as the middle {degrees} degrees"
            )
        warnings.warn(f"{problem}: taken as the middle {degrees} degrees of the sphere", stacklevel=4)
    full_height, full_width, top, left = area
    if (full_height, full_width) == (height, width):
        return Panorama(pixels, seen=seen)
    covered = _shares(area, height, width)

    # Reduced before it is laid on the canvas, so that the canvas is no larger than what is needed.
    most = max(1, int(full_width / needed_width))
    k = max(k for k in range(1, most + 1) if full_width % k == full_height % k == 0)
    neutral = torch.tensor(fill, device=pixels.device) * (255 if pixels.dtype == torch.uint8 else 1)
    neutral = (neutral.round() if pixels.dtype == torch.uint8 else neutral).to(pixels.dtype)
    row, column = top // k, left // k
    rows, columns = -(-(top + height) // k) - row, -(-(left + width) // k) - column
    part = neutral.expand(rows * k, columns * k, 3).clone()
    part[top - row * k :, left - column * k :][:height, :width] = pixels
    if k > 1:
        reduced = F.avg_pool2d(part.permute(2, 0, 1)[None].float(), k)[0].permute(1, 2, 0)
        part = (reduced.round() if pixels.dtype == torch.uint8 else reduced).to(pixels.dtype)
    canvas = neutral.expand(full_height // k, full_width // k, 3).clone()
    canvas[row : row + rows, column : column + columns] = part
    if seen is not None:
        whole = seen.new_zeros(full_height, full_width)
        whole[top : top + height, left : left + width] = seen
        seen = whole
    return Panorama(canvas, covered, seen)


def covered_by_size(height: int, width: int) -> tuple[float, float, float, float] | None:
    """What an image [height, width] without Photo Sphere data covers, as :attr:`Panorama.covered`."""
    area = _middle_of_the_sphere(height, width)
    return None if area is None else _shares(area, height, width)


def _middle_of_the_sphere(height: int, width: int) -> tuple[int, int, int, int] | None:
    """The place, as :func:`_area_of` has it, of an image of which nothing is known but its size; `None` where it is
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


def _area_of(sphere: PhotoSphere | None, height: int, width: int, name: str) -> tuple[int, int, int, int] | None:
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


def _turn(panorama: Panorama, yaw: float) -> Panorama:
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


def _mirror(panorama: Panorama) -> Panorama:
    """The panorama with left and right exchanged: what is at a yaw comes to its negative."""
    covered = panorama.covered
    if covered is not None and covered[3] - covered[2] < 1:
        left = (1 - covered[3]) % 1
        covered = (covered[0], covered[1], left, left + covered[3] - covered[2])
    seen, rotation = panorama.seen, panorama.rotation
    if rotation is not None:
        rotation = _LEFT_RIGHT @ rotation @ _LEFT_RIGHT
    return Panorama(panorama.pixels.flip(1), covered, None if seen is None else seen.flip(1), rotation)


def _resample(panorama: Panorama) -> Panorama:
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
