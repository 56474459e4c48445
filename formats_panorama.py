"""Formats that Pillow does not read, or not rightly: float and planar TIFF, Radiance .hdr and OpenEXR, by OpenImageIO;
HEIC, by pillow-heif. Both come with the extra `formats`."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

_HINT = 'pip install "panorama-vlm[formats]"'
_KINDS = {
    b"#?RADIANCE": ("Radiance HDR", ".hdr"),
    b"#?RGBE": ("Radiance HDR", ".hdr"),
    b"\x76\x2f\x31\x01": ("OpenEXR", ".exr"),
    b"II*\0": ("TIFF", ".tif"),
    b"MM\0*": ("TIFF", ".tif"),
    b"II+\0": ("TIFF", ".tif"),
    b"MM\0+": ("TIFF", ".tif"),
}
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_ROWS = 64  # that are converted at a time
_KEY = 0.18  # what the log-average luminance of a linear picture is brought to


class UnreadableFormat(ValueError):
    """A format that is known, and the library that reads it is missing, or cannot."""


def kind_of(head: bytes) -> tuple[str, str] | None:
    """Name and ending of the format of a file that OpenImageIO is to read, by its first bytes."""
    return next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)


def is_misread(image: Image.Image) -> bool:
    """Whether Pillow opens a TIFF that it reads as noise: planes of more than 8 bit."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, (8,))
    return tags.get(284) == 2 and len(bits) > 1 and max(bits) > 8


def register_heic(head: bytes) -> None:
    """Let Pillow read HEIC, where this is one and it does not yet.

    Raises:
        UnreadableFormat: where pillow-heif is missing.
    """
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIC_BRANDS or "HEIF" in Image.OPEN:
        return
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise UnreadableFormat(f"it is HEIC: pip install pillow-heif, or {_HINT}") from None
    register_heif_opener()


class FloatFile(ImageFile.ImageFile):
    """A file that OpenImageIO reads, as an image of 8 bit in sRGB that is decoded when its pixels are asked for.

    Integers, and floats of a TIFF that lie in [0, 1], are levels, as they are. Anything else is linear light: with
    Y = 0.2126 R + 0.7152 G + 0.0722 B, scaled so that the mean of log Y (where it is not 0) is log 0.18, colours are
    multiplied by 1 / (1 + Y) and encoded by IEC 61966-2-1. That is the global operator, equations 1 to 3, of Reinhard
    et al., Photographic Tone Reproduction for Digital Images (SIGGRAPH 2002). Negative values are 0.

    Raises:
        UnreadableFormat: where OpenImageIO is missing, or does not read the file.
    """

    fp: Any

    def _open(self) -> None:
        head = self.fp.read(16)
        found = kind_of(head)
        if found is None:
            raise SyntaxError("no format that OpenImageIO is asked for")
        self.format, self._ending = found
        with self._input() as opened:
            spec = opened.spec()
            self._size = (spec.full_width, spec.full_height)
            self._offset = (spec.x - spec.full_x, spec.y - spec.full_y)
            self._channels = _channels(list(spec.channelnames))
            self._is_float = spec.format.basetype in (_oiio().FLOAT, _oiio().HALF, _oiio().DOUBLE)
            is_part = (spec.width, spec.height) != self._size or self._offset != (0, 0)
        self._mode = "RGBA" if len(self._channels) in (2, 4) or is_part else "RGB"
        self.tile = [ImageFile._Tile("openimageio", (0, 0, *self._size), 0, None)]
        if self.format == "TIFF":
            self._read_tags()

    def _read_tags(self) -> None:
        """What others ask of a TIFF: Photo Sphere data, colour profile, orientation."""
        self.fp.seek(0)
        head = self.fp.read(8)
        if head[2:4] in (b"+\0", b"\0+"):
            return
        tags = ImageFileDirectory_v2(head)
        self.fp.seek(tags.next)
        tags.load(self.fp)
        for name, tag in (("xmp", 700), ("icc_profile", 34675)):
            if tag in tags:
                self.info[name] = tags[tag]
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = tags.get(274, 1)
        self.info["exif"] = exif.tobytes()

    def load(self) -> Any:
        """Decode it, rows at a time."""
        if self.tile:
            with self._input() as opened:
                scale = self._exposure(opened)
                picture = Image.new(self.mode, self.size)
                for top, rows in _rows(opened, self._channels):
                    piece = Image.fromarray(_levels(rows, scale))
                    place = (self._offset[0], self._offset[1] + top)
                    picture.paste(piece.convert(self.mode), place)
            if scale is not None:
                self.info.pop("icc_profile", None)  # its colours are no longer those
            self.im, self.tile = picture.im, []
        return super().load()

    def _exposure(self, opened: Any) -> float | None:
        """What linear light is multiplied by; `None` for levels."""
        if not self._is_float:
            return None
        low, high, total, count = 0.0, 0.0, 0.0, 0
        for _, rows in _rows(opened, self._channels):
            if np.isnan(rows).any():
                raise ValueError("some of its values are not a number")
            low, high = min(low, float(rows.min())), max(high, float(rows.max()))
            light = _luminance(rows)
            light = light[(light > 0) & np.isfinite(light)]
            total, count = total + float(np.log(light, dtype=np.float64).sum()), count + light.size
        if self.format == "TIFF" and low >= 0 and high <= 1:
            return None
        return float(_KEY / np.exp(total / count)) if count else 1.0

    @contextmanager
    def _input(self) -> Iterator[Any]:
        """The file in OpenImageIO, which wants a name: what is not on disk is written there for the time."""
        oiio = _oiio(self.format)
        name, written = os.fspath(self.filename or ""), None
        if not name:
            self.fp.seek(0)
            with tempfile.NamedTemporaryFile(suffix=self._ending, delete=False) as file:
                file.write(self.fp.read())
            name = written = file.name
        try:
            opened = oiio.ImageInput.open(name)
            if opened is None:
                raise UnreadableFormat(f"OpenImageIO does not read this {self.format}: {oiio.geterror()}")
            try:
                yield opened
            finally:
                opened.close()
        finally:
            if written is not None:
                os.unlink(written)


def open_float_file(file: BinaryIO, name: str) -> Image.Image:
    """A file that OpenImageIO reads, not decoded yet; see :class:`FloatFile`."""
    file.seek(0)
    return FloatFile(file, name)


def _oiio(kind: str | None = None) -> Any:
    try:
        import OpenImageIO
    except ImportError:
        raise UnreadableFormat(f"it is {kind} of a kind that Pillow does not read: {_HINT}") from None
    return OpenImageIO


def _channels(names: list[str]) -> list[int]:
    """Which channels are the picture: grey or red, green and blue, and alpha where there is one."""
    found = {name.upper().rsplit(".", 1)[-1]: place for place, name in reversed(list(enumerate(names)))}
    colours = next((group for group in (("R", "G", "B"), ("Y",), ("I",)) if all(n in found for n in group)), None)
    if colours is None and len(names) != 1:
        raise UnreadableFormat(f"its channels are {names}, not red, green and blue or one of grey")
    alpha = [found["A"]] if "A" in found and colours else []
    return [found[name] for name in colours or ()] + alpha or [0]


def _rows(opened: Any, channels: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Where rows begin, and the rows [n, W, channels], float32."""
    spec = opened.spec()
    step = max(_ROWS // spec.tile_height, 1) * spec.tile_height if spec.tile_width else _ROWS
    if spec.getattribute("planarconfig") == "separate":  # libtiff goes through compressed planes once
        step = spec.height
    for top in range(0, spec.height, step):
        first, last = spec.y + top, spec.y + min(top + step, spec.height)
        if spec.tile_width:
            across = (spec.x, spec.x + spec.width)
            rows = opened.read_tiles(*across, first, last, 0, 1, 0, spec.nchannels, "float")
        else:
            rows = opened.read_scanlines(first, last, 0, 0, spec.nchannels, "float")
        if rows is None:
            raise ValueError(opened.geterror() or "its pixels cannot be read")
        rows = np.asarray(rows).reshape(last - first, spec.width, spec.nchannels)
        yield top, rows[..., channels]


def _luminance(rows: np.ndarray) -> np.ndarray:
    """Of linear light [n, W, 1 to 4]: [n, W] (ITU-R BT.709)."""
    return rows[..., :3] @ np.array([0.2126, 0.7152, 0.0722], np.float32) if rows.shape[-1] > 2 else rows[..., 0]


def _levels(rows: np.ndarray, scale: float | None) -> np.ndarray:
    """[n, W, 3 or 4], uint8."""
    colours, alpha = rows[..., : 3 if rows.shape[-1] > 2 else 1], rows[..., 3 if rows.shape[-1] > 2 else 1 :]
    if scale is not None:
        light = np.minimum(np.maximum(colours, 0) * np.float32(scale), 1e6)
        light = light / (1 + np.maximum(_luminance(light), 0)[..., None])
        colours = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    shown = np.concatenate([np.broadcast_to(colours, (*colours.shape[:2], 3)), alpha], -1)
    return (np.clip(shown, 0, 1) * 255 + 0.5).astype(np.uint8)
