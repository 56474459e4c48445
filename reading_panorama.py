"""Reading: whatever holds a panorama in, its pixels on the whole sphere out."""

import base64
import hashlib
import io
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from .colours_panorama import is_srgb, to_srgb
from .formats_panorama import is_misread, kind_of, open_float_file, register_heic
from .geometry_panorama import View, camera_rotation, yaw_rotation
from .options_panorama import IMAGE_MEAN
from .photo_sphere_panorama import (
    PhotoSphere,
    photo_sphere_of,
    position_of,
    tiff_position_tags,
    with_tiff_position,
    xmp_packets,
)
from .placing_panorama import (
    LARGE,
    MAX_SIDE,
    STRIP,
    Panorama,
    area_of,
    block_means,
    check_looks,
    flipped,
    from_cylinder,
    from_projection,
    middle_of_the_sphere,
    place,
    resampled,
    turned,
)
from .projections_panorama import Projection

try:  # takes less time and memory for a JPEG; Pillow gives the same pixels
    import simplejpeg
except ImportError:
    simplejpeg = None

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | dict[str, Any] | Image.Image | np.ndarray | torch.Tensor

MAX_PIXELS = 2**28  # that are held while a file is decoded, at 4 bytes each in most formats: 1 GiB
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000", "BMP", "PPM")
_SAME_FORMAT = {"MPO": "JPEG"}  # several JPEGs in one file: what phones write
_MAGIC = {b"GIF8": "a GIF", b"%PDF": "a PDF", b"<svg": "an SVG", b"<!DO": "a web page", b"<htm": "a web page"}
_NAME = "panorama_name"  # attribute of an image, for messages: Pillow would map the file that `filename` names
_PROJECTIONS = ("equirectangular", "cylindrical")  # of Photo Sphere data


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
    """The bytes of a file in base64, or in a data URL (RFC 2397): base64 after `data:TYPE;base64,`, percents after
    `data:TYPE,`.

    Raises:
        ValueError: for what is no base64; of its text, which may be long, only the head is repeated.
    """
    head, comma, data = str(text).partition(",")
    if not head.startswith("data:"):
        head, data = "no data URL", str(text)
    elif not comma:
        raise ValueError(f"cannot read a data URL that begins with {str(text)[:60]!r}: it has no comma before its data")
    elif not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
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
    max_pixels: int = MAX_PIXELS,
    projection: str | None = None,
) -> Panorama:
    """Decode a panorama, no larger than it has to be, and place it on the sphere.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where this leaves `needed_width`; other files of more than 8 MP
    are reduced in strips. So a file takes what its decoder holds (4 bytes a pixel of it, 8 where EXIF turns it; of a
    JPEG that is not progressive only what is left of it) and 24 bytes a pixel of a sphere of twice `needed_width`.

    The data of a Photo Sphere say which part of the sphere the image shows. Without them an image twice as wide as high
    is the whole sphere, and any other is taken as a band around the horizon (or, where it is higher, around the front)
    of the same degrees a pixel.

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
        max_pixels: the most pixels that are held while a file is decoded, and that a sphere has of which the file
            shows a part.
        projection: what the image is, where it is not equirectangular (see :class:`Projection`); of a row of a
            column, its `"projection"`. What the file says of its place is not asked then.

    Raises:
        TypeError: for what is no image.
        ValueError: for a file that is broken (whatever its decoder raises) or too large, a shape or type that is no
            image, float values outside [0, 1]; the file and the reason are named.
    """
    image = open_image(source)
    sphere: PhotoSphere | None = None
    area, scale = None, 1
    if isinstance(source, dict):
        projection = source.get("projection") or projection
    shape = Projection.parse(projection)
    name = _name(image) if isinstance(image, Image.Image) else "the panorama"
    if isinstance(image, Image.Image):
        with _decoding(image, source):
            if shape.name == "equirectangular":
                sphere = read_photo_sphere(image)  # before the pixels: some of it is not found after them
            if sphere is not None and projection is None:
                shape = shape_of(sphere)
            height, width = _upright_size(image, max_pixels)
            needed = needed_width
            if shape.name == "equirectangular":
                area = area_of(sphere, height, width, name)
            else:  # columns of the file that are needed
                needed *= max(width, 2 * height) / shape.native_width(height, width)
            pixels, seen, scale = _decode(image, needed, area, fill, image is not source, max_pixels)
    else:
        pixels, seen = _from_array(image, fill)
        height, width = pixels.shape[:2]
        _check_size(name, (width, height))
    if seen is not None and not seen.any():
        raise ValueError(f"cannot read {name}: all of it is transparent: there is nothing to see")
    size = (height, width)
    if shape.name == "cylindrical":
        pixels, seen, area = from_cylinder(pixels, seen, scale, size, sphere, strict_aspect, name)
        size, scale = (pixels.shape[0], pixels.shape[1]), 1
    elif shape.name == "equirectangular" and projection is None and area is None and seen is None:
        check_looks(pixels, size, strict_aspect, name)
    if shape.name in _PROJECTIONS:
        panorama = place(pixels, seen, scale, size, area, needed_width, fill, strict_aspect, name, max_pixels)
    else:
        try:
            panorama = from_projection(pixels, seen, shape, needed_width, fill)
        except ValueError as error:
            raise ValueError(f"cannot read {name}: {error}") from None
    if align_heading and sphere is not None and sphere.heading is not None:
        yaw_offset -= sphere.heading
    if level and sphere is not None and (sphere.pitch or sphere.roll):
        panorama = replace(panorama, rotation=camera_rotation(sphere.pitch, sphere.roll).T)
    panorama = turned(panorama, yaw_offset) if yaw_offset % 360 else panorama
    panorama = flipped(panorama) if mirrored else panorama
    return resampled(panorama) if resample and panorama.rotation is not None else panorama


def read_photograph(source: ImageSource, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Pixels of a photograph that is no panorama, decoded as those of one: upright, [H, W, 3], uint8 in sRGB, or
    float32 in [0, 1]. Arguments and errors are those of :func:`read_panorama`."""
    image = open_image(source)
    if not isinstance(image, Image.Image):
        return _from_array(image, IMAGE_MEAN)[0]
    with _decoding(image, source):
        _upright_size(image, max_pixels)
        return _decode(image, math.inf, None, IMAGE_MEAN, image is not source, max_pixels)[0]


def to_erp_tensor(source: ImageSource) -> torch.Tensor:
    """The whole panorama as float32 [3, H, W] in [0, 1]; see :func:`read_panorama`."""
    pixels = read_panorama(source).pixels.permute(2, 0, 1)
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def read_photo_sphere(image: Image.Image) -> PhotoSphere | None:
    """The Photo Sphere data of an opened image, or what the tags of a TIFF say in their place; `None` where it has
    none. What cannot be understood is warned about."""
    sphere = photo_sphere_of(xmp_packets(image), _name(image))
    return with_tiff_position(sphere, image, _name(image))


@dataclass(frozen=True)
class Layout:
    """How the picture of a file lies on the sphere, and which way its front is.

    Args:
        width, height: of the picture in pixels, turned as EXIF says.
        full: (height, width) of the whole sphere in the same pixels.
        top, left: where the picture begins in it.
        projection: of the picture, by the name of a :class:`Projection`.
        pitch, roll: degrees that the camera looked up and leaned to the right, where the panorama is levelled by them.
        heading: compass direction, in degrees, of the middle of the whole sphere; `None` where it is not known.
        yaw_offset: degrees to the right of that middle that are the front, where yaw is 0.
        position: latitude and longitude of the camera in degrees; `None` where it is not known.
    """

    width: int
    height: int
    full: tuple[int, int]
    top: int = 0
    left: int = 0
    projection: str = "equirectangular"
    pitch: float = 0.0
    roll: float = 0.0
    heading: float | None = None
    yaw_offset: float = 0.0
    position: tuple[float, float] | None = None

    def bearing(self, yaw: float) -> float | None:
        """The compass direction, in [0, 360), of a yaw; `None` where it is not known."""
        return None if self.heading is None else (self.heading + self.yaw_offset + yaw) % 360

    def sees(self, yaw: float, pitch: float) -> bool:
        """Whether the picture shows a direction, in degrees."""
        if self.projection != "equirectangular" or (self.height, self.width) == self.full:
            return True
        rotation = camera_rotation(self.pitch, self.roll).T @ yaw_rotation(self.yaw_offset)
        turned = View("perspective", yaw, pitch, 90.0).rotated(rotation)
        column = (turned.yaw / 360 + 0.5) % 1 * self.full[1] - self.left
        row = (0.5 - turned.pitch / 180) * self.full[0] - self.top
        return 0 <= column <= self.width and 0 <= row <= self.height


def layout_of(source: Any, *, align_heading: bool = False, level: bool = True, projection: str | None = None) -> Layout:
    """How the picture of a file lies on the sphere, as :func:`read_panorama` reads it with the same options; the pixels
    are not decoded.

    Args:
        source: see :func:`read_panorama`.

    Raises:
        ValueError: for a file that is broken; it is named.
    """
    image = open_image(source)
    if isinstance(source, dict):
        projection = source.get("projection") or projection
    shape = Projection.parse(projection)
    if not isinstance(image, Image.Image):
        if not isinstance(image, np.ndarray | torch.Tensor) or image.ndim not in (2, 3):
            raise ValueError(f"a panorama must be a file, an image, or an array [H, W, 3], got {type(image).__name__}")
        sizes = list(image.shape)
        channels_first = len(sizes) == 3 and sizes[0] in (1, 3, 4) and sizes[-1] not in (1, 3, 4)
        height, width = sizes[-2:] if channels_first else sizes[:2]
        return _laid_out(None, height, width, shape.name, "the panorama")
    name = _name(image)
    try:
        sphere = read_photo_sphere(image) if shape.name == "equirectangular" else None
        if sphere is not None and projection is None:
            shape = shape_of(sphere)
        width, height = image.size if _orientation(image) < 5 else image.size[::-1]
        layout = _laid_out(sphere, height, width, shape.name, name)
        position = position_of(image, name)
    finally:
        if image is not source and not hasattr(source, "read"):
            image.close()
    heading = None if sphere is None or sphere.heading is None else sphere.heading % 360
    return replace(
        layout,
        pitch=sphere.pitch if level and sphere is not None else 0.0,
        roll=sphere.roll if level and sphere is not None else 0.0,
        heading=heading,
        yaw_offset=-heading if align_heading and heading is not None else 0.0,
        position=position,
    )


def _laid_out(sphere: PhotoSphere | None, height: int, width: int, projection: str, name: str) -> Layout:
    whole = (height, width, 0, 0)
    if projection == "equirectangular":
        whole = area_of(sphere, height, width, name) or middle_of_the_sphere(height, width) or whole
    return Layout(width, height, (whole[0], whole[1]), whole[2], whole[3], projection)


def shape_of(sphere: PhotoSphere) -> Projection:
    """What Photo Sphere data say an image is.

    Raises:
        ValueError: for what is not read without being told; it is named.
    """
    if sphere.projection not in _PROJECTIONS:
        read = " and ".join(_PROJECTIONS)
        words = f"its Photo Sphere data say that its projection is {sphere.projection!r}, read are {read}"
        raise ValueError(f"{words}; convert it, or say with projection= what it is where ProjectionType is wrong")
    return Projection(sphere.projection)


def load_file_bytes(source: Any) -> Any:
    """What names a file, as a row with its bytes and its path (see :func:`open_image`), so that who needs them twice
    reads the file once; anything else as it is.

    Raises:
        OSError: for a file that does not exist or cannot be opened; it is named.
    """
    if isinstance(source, dict) and not source.get("bytes") and source.get("path"):
        return {**source, "bytes": Path(source["path"]).read_bytes()}
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
        kept = [source.info.get(name) for name in ("transparency", "icc_profile")]
        kept += [palette, xmp_packets(source), tiff_position_tags(source)]
        header = f"{source.mode} {source.size} {kept!r} {dict(source.getexif())}"
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
    try:
        image = _identified(file)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # decoders raise anything
        raise ValueError(f"cannot read {name}: {error}") from error
    if image is None:
        raise ValueError(f"cannot read {name}: {_what_is_it(file)}")
    promised = Image.registered_extensions().get(Path(name).suffix.lower())
    if promised is not None and _family(promised) != _family(image.format):
        words = f"{name} is named as {_family(promised)}, but holds {_family(image.format)}: read as what it holds"
        warnings.warn(words, stacklevel=3)
    setattr(image, _NAME, name)
    return image


def _identified(file: str | BinaryIO) -> Image.Image | None:
    """As `Image.open`, `None` for what is no image, but without its limit of size: that is one for the whole process,
    and of files that are not decoded as a whole."""
    Image.init()
    image: Any
    opened: Any = open(file, "rb") if isinstance(file, str) else file  # noqa: SIM115
    opened.seek(0)
    head = opened.read(16)
    try:
        register_heic(head)
        for factory, accept in (Image.OPEN[format] for format in _FORMATS if format in Image.OPEN):
            fits = accept is None or accept(head)
            if not fits or isinstance(fits, str):  # a string says why it cannot be read here
                continue
            opened.seek(0)
            try:
                image = factory(opened, file if isinstance(file, str) else "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # of another format, or its head is broken
                continue
            if is_misread(image):
                image = open_float_file(opened, file if isinstance(file, str) else "")
            image._exclusive_fp = opened is not file  # it closes what was opened here
            return image
        if kind_of(head) is not None:
            image = open_float_file(opened, file if isinstance(file, str) else "")
            image._exclusive_fp = opened is not file
            return image
    except BaseException:
        if opened is not file:
            opened.close()
        raise
    if opened is not file:
        opened.close()
    return None


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


@contextmanager
def _decoding(image: Image.Image, source: Any) -> Iterator[None]:
    """Whatever a decoder raises names the file, and what was opened here is closed."""
    name = _name(image)
    try:
        yield
    except Exception as error:  # decoders raise anything
        raise ValueError(f"cannot read {name}: {str(error).removeprefix(f'cannot read {name}: ')}") from error
    finally:
        if image is not source and not hasattr(source, "read"):  # a file object stays open for its owner
            image.close()


def _upright_size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    """Height and width of an image as it is shown. Those of a file but a JPEG are known when it is decoded: some tell
    only then which way is up."""
    _check_size(_name(image), image.size)
    if _family(image.format) != "JPEG":
        _check_pixels(image, 1, max_pixels)
        image.load()
    return image.size[::-1] if _orientation(image) < 5 else image.size


def _is_lazy(image: Image.Image) -> bool:
    """Whether an image is opened, but not decoded yet."""
    return bool(getattr(image, "tile", None)) and getattr(image, "fp", None) is not None


def _decode(
    image: Image.Image,
    needed_width: float,
    area: tuple[int, int, int, int] | None,
    fill: Sequence[float],
    is_ours: bool,
    max_pixels: int,
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Pixels [ceil(H / k), ceil(W / k), 3] of an upright image [H, W], what of them is seen, as :func:`_from_array`,
    and k, which they are reduced by. `area` is the image's place as :func:`area_of` has it; `is_ours`: whether nobody
    else will look at it."""
    scale = 1
    if _family(image.format) == "JPEG" and _is_lazy(image):
        scale = _jpeg_scale(image, needed_width, area)
        _check_pixels(image, scale, max_pixels)
        width, height = image.width // scale, image.height // scale
        file: BinaryIO = image.fp  # type: ignore[attr-defined]
        file.seek(0)
        if (
            simplejpeg is not None
            and is_srgb(image.info.get("icc_profile"))
            and image.mode in ("L", "RGB")
            and _orientation(image) == 1
        ):
            least = {"min_height": -(-image.height // scale), "min_width": -(-image.width // scale)}
            try:
                return torch.from_numpy(simplejpeg.decode_jpeg(file.read(), **least)), None, scale
            except ValueError:  # where the least is wrong; whether it can be read, Pillow decides
                file.seek(0)
        if not is_ours:  # opened a second time: the one that was handed in would be small for its owner, too
            name = _name(image)
            image = _identified(file)  # type: ignore[assignment]
            setattr(image, _NAME, name)
        image.draft(image.mode, (width, height))
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    k = 1
    if scale == 1 and image.width * image.height > LARGE:
        full_width = area[1] if area is not None else max(image.width, 2 * image.height)
        k = min(max(int(full_width / needed_width), 1), 64)
    pixels, seen = None, None
    step = max(STRIP // k, 1) * k
    for top in range(0, image.height, step):  # rows at a time: what is converted takes much more
        strip, opaque = _converted(image.crop((0, top, image.width, min(top + step, image.height))), fill)
        strip = block_means(strip, k)
        rows = slice(top // k, top // k + len(strip))
        if pixels is None:
            pixels = torch.empty(-(-image.height // k), *strip.shape[1:], dtype=strip.dtype)
        pixels[rows] = strip
        if opaque is not None:
            seen = torch.ones(pixels.shape[:2], dtype=torch.bool) if seen is None else seen
            seen[rows] = block_means(opaque[..., None].float(), k)[..., 0] >= 0.5
    assert pixels is not None
    return pixels, seen, scale * k


def _check_pixels(image: Image.Image, scale: int, max_pixels: int) -> None:
    """Refuse what would take more memory than is allowed; `scale` is what a JPEG is reduced by."""
    if not _is_lazy(image):
        return
    in_strips = _family(image.format) == "JPEG" and not image.info.get("progressive")
    held = math.prod(-(-side // scale) if in_strips else side for side in image.size)
    if held > max_pixels:
        raise ValueError(
            f"it is {image.width} x {image.height} pixels, of which decoding would hold {held}, and max_pixels is "
            f"{max_pixels}. Give a smaller file, or a larger max_pixels (4 bytes of memory each)"
        )


def _converted(image: Image.Image, fill: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixels [H, W, 3] of a decoded image, uint8 in sRGB, or float32 in [0, 1] as they are, and what of them is seen,
    as :func:`_from_array`."""
    if image.mode.startswith("I;16"):
        return _from_array(np.array(image).astype(np.uint16), fill)
    if image.mode == "I":  # 16 bit as well, in formats that PIL widens
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values must be in [0, 65535], they are in [{values.min()}, {values.max()}]")
        return _from_array(values.astype(np.uint16), fill)
    if image.mode == "F":
        return _from_array(np.array(image), fill)
    image = to_srgb(image, image.info.get("icc_profile"))
    if image.has_transparency_data:
        return _from_array(np.array(image.convert("RGBA")), fill)
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))), None


def _jpeg_scale(image: Image.Image, needed_width: float, area: tuple[int, int, int, int] | None) -> int:
    """8, 4, 2 or 1: what a JPEG may be reduced by; one that is not large by no more than its sides are divisible by."""
    full_width = 2 * image.width if _orientation(image) >= 5 else max(image.width, 2 * image.height)
    full_width = full_width if area is None else area[1]
    sides = (*image.size, *(area or ()))
    large = image.width * image.height > LARGE
    scales = (s for s in (8, 4, 2) if full_width / s >= needed_width and (large or all(n % s == 0 for n in sides)))
    return next(scales, 1)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 is upright, from 5 on the image lies on its side."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


# Arrays


def _from_array(image: Any, fill: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixels [H, W, 3], uint8 or float32 in [0, 1], and what of them is not fully transparent, bool [H, W]; `None`
    where that is all."""
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise TypeError(
            "a panorama must be a path, bytes, a file object, a PIL image, an array or a tensor, got "
            f"{type(image).__name__}"
        )
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
