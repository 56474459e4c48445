"""Photo Sphere data: what a file says about which part of the sphere it shows, and how its camera was held."""

import math
import re
import warnings
import zlib
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

from PIL import ExifTags, Image

# A prefix is only a name (writers use GPano, ns2, …); some leave the last slash out.
_NAMESPACE = re.compile(r"\{https?://ns\.google\.com/photos/1\.0/panorama/?\}(\w+)")
_MENTIONED = re.compile(r"ns\.google\.com/photos/1\.0/panorama|GPano")
_USED = (
    "ProjectionType",
    "FullPanoHeightPixels",
    "FullPanoWidthPixels",
    "CroppedAreaImageHeightPixels",
    "CroppedAreaImageWidthPixels",
    "CroppedAreaTopPixels",
    "CroppedAreaLeftPixels",
    "PoseHeadingDegrees",
    "PosePitchDegrees",
    "PoseRollDegrees",
)
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_EXTENDED = b"http://ns.adobe.com/xmp/extension/\0"
_PNG_PROFILES = ("Raw profile type xmp", "Raw profile type APP1")
_JPEG_2000_XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_TIFF_POSITION = (282, 283, 286, 287, 33300, 33301)  # resolution, position, and the size of the whole image
_MOST_TEXT = 1 << 26  # bytes of a packet
_ENCODINGS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"<\0\0\0": "utf-32-le",
    b"\0\0\0<": "utf-32-be",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
    b"\xef\xbb\xbf": "utf-8-sig",
}


@dataclass(frozen=True)
class PhotoSphere:
    """Google's Photo Sphere XMP (https://developers.google.com/streetview/spherical-metadata), as far as it is used.

    Args:
        full: (height, width) of the whole sphere in pixels of the file.
        crop: (height, width) of the part of it that the file holds.
        top, left: where this part begins.
        heading: compass direction of the middle of the whole sphere, in degrees; `None` where it is not known.
        pitch, roll: degrees that the camera looked up (the middle lies above the horizon by this) and leaned to the
            right (the horizon turns to the left in the image, as roll rises).
        projection: in small letters.
    """

    full: tuple[int, int] | None
    crop: tuple[int, int] | None
    top: int = 0
    left: int = 0
    heading: float | None = None
    pitch: float = 0.0
    roll: float = 0.0
    projection: str = "equirectangular"


def photo_sphere_of(packets: list[bytes], name: str) -> PhotoSphere | None:
    """What XMP packets say, `None` where that is nothing; what cannot be understood is warned about.

    Args:
        packets: each as its file has it.
        name: of the file, for messages.
    """
    found: dict[str, str] = {}
    for packet in packets:
        text = _decoded(packet)
        if not _MENTIONED.search(text):
            continue
        try:
            values = _values(text)
        except (ElementTree.ParseError, ValueError) as error:
            warnings.warn(f"the Photo Sphere data of {name} cannot be read, ignored: {error}", stacklevel=4)
            continue
        for key, value in values:
            if key in _USED and not _is_same(value, found.setdefault(key, value)):
                words = f"the Photo Sphere data of {name} contradict each other: {key} is {found[key]} and {value}"
                warnings.warn(f"{words}; the first is taken", stacklevel=4)
    if not found:
        return None
    numbers = {key: float(value) for key, value in found.items() if _is_number(value)}
    sizes = ("FullPanoHeightPixels", "FullPanoWidthPixels")
    crops = ("CroppedAreaImageHeightPixels", "CroppedAreaImageWidthPixels")
    full = tuple(int(numbers[key]) for key in sizes) if all(key in numbers for key in sizes) else None
    crop = tuple(int(numbers[key]) for key in crops) if all(key in numbers for key in crops) else None
    top, left = (int(numbers.get(f"CroppedArea{side}Pixels", 0)) for side in ("Top", "Left"))
    heading = numbers.get("PoseHeadingDegrees")
    pitch, roll = (numbers.get(f"Pose{angle}Degrees", 0.0) for angle in ("Pitch", "Roll"))
    projection = found.get("ProjectionType", "equirectangular").lower()
    return PhotoSphere(full, crop, top, left, heading, pitch, roll, projection)  # type: ignore[arg-type]


def with_tiff_position(sphere: PhotoSphere | None, image: Image.Image, name: str) -> PhotoSphere | None:
    """Photo Sphere data, and what the tags of a TIFF say that holds a cropped layer of a panorama, as stitchers write
    them: XPosition and YPosition in units of its resolution (TIFF 6.0, page 55), and Pixar's size of the whole image.
    What Photo Sphere data say goes first."""
    tags = tiff_position_tags(image)
    try:
        left, top = (
            round(float(tags.get(place, 0)) * float(tags.get(unit, 1))) for place, unit in ((286, 282), (287, 283))
        )
        full = int(tags[33301]), int(tags[33300])
    except KeyError:
        if (left or top) and sphere is None:
            words = f"{name} lies at {left}, {top} of a larger image by its TIFF tags, which do not say how large a one"
            warnings.warn(f"{words}: ignored", stacklevel=4)
        return sphere
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        warnings.warn(f"the TIFF tags of {name} do not say where it lies, ignored: {error}", stacklevel=4)
        return sphere
    crop = (image.height, image.width)
    if full == crop:
        return sphere
    if sphere is None or sphere.full is None:
        return replace(sphere or PhotoSphere(None, None), full=full, crop=crop, top=top, left=left)
    if (sphere.full, sphere.crop, sphere.top, sphere.left) != (full, crop, top, left):
        words = f"the Photo Sphere data and the TIFF tags of {name} contradict each other about where it lies"
        warnings.warn(f"{words}; the Photo Sphere data are taken", stacklevel=4)
    return sphere


def tiff_position_tags(image: Image.Image) -> dict[int, Any]:
    """The tags of a TIFF that :func:`with_tiff_position` understands; none of any other image."""
    tags = getattr(image, "tag_v2", {})
    return {tag: tags[tag] for tag in _TIFF_POSITION if tag in tags}


def position_of(image: Image.Image, name: str) -> tuple[float, float] | None:
    """Where a camera stood by the GPS tags of EXIF (EXIF 2.32, 4.6.6): latitude and longitude in degrees, north and
    east positive; `None` where they do not say, and what cannot be is warned about."""
    try:
        gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        signs = [-1 if str(gps.get(tag, "")).strip("\0 ").upper() in ("S", "W") else 1 for tag in (1, 3)]
        if 2 not in gps or 4 not in gps:
            return None
        latitude, longitude = (
            sign * sum(float(part) / 60**place for place, part in enumerate(gps[tag]))  # degrees, minutes, seconds
            for sign, tag in zip(signs, (2, 4), strict=True)
        )
        if not (abs(latitude) <= 90 and abs(longitude) <= 180):  # also catches NaN, which cameras write without a fix
            raise ValueError(f"latitude {latitude:g}, longitude {longitude:g}")
    except Exception as error:  # EXIF that is broken raises anything
        warnings.warn(f"the GPS position of {name} cannot be read, ignored: {error}", stacklevel=3)
        return None
    return latitude, longitude


def xmp_packets(image: Image.Image) -> list[bytes]:
    """All XMP of an opened image, as its file has it: of a JPEG and PNG every packet, wherever it lies."""
    packets = [*_jpeg_packets(getattr(image, "applist", [])), *_png_packets(image), *_jpeg_2000_packets(image)]
    known = (image.info.get(key) for key in ("xmp", "XML:com.adobe.xmp"))
    packets += [packet.encode() if isinstance(packet, str) else bytes(packet) for packet in known if packet]
    return list(dict.fromkeys(packets))


def _jpeg_packets(segments: list[tuple[str, bytes]]) -> list[bytes]:
    """Of the segments of a JPEG. What is too long for one follows in extensions, each with the digest of all of it (32
    characters), its length, where this part begins, and the part (XMP specification, part 3, 1.1.3.1)."""
    packets, extended = [], dict[bytes, dict[int, bytes]]()
    for marker, data in segments:
        if marker == "APP1" and data.startswith(_JPEG_XMP):
            packets.append(data.removeprefix(_JPEG_XMP))
        elif marker == "APP1" and data.startswith(_JPEG_EXTENDED):
            data = data.removeprefix(_JPEG_EXTENDED)
            if len(data) > 40:
                extended.setdefault(data[:36], {})[int.from_bytes(data[36:40])] = data[40:]
    return packets + [b"".join(parts[start] for start in sorted(parts)) for parts in extended.values()]


def _png_packets(image: Image.Image) -> list[bytes]:
    """Of the text of a PNG: XMP, and the profiles in hex that ImageMagick writes. Pillow reads what lies after the
    pixels when it decodes them; of an image that is not decoded yet it is looked up here."""
    texts = {key: value for key, value in image.info.items() if str(key).startswith(_PNG_PROFILES)}
    packets = [_unhex(str(value)) for value in texts.values()]
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None or not getattr(image, "tile", None):
        return packets
    before = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length, after = int.from_bytes(head[:4]), file.tell() + int.from_bytes(head[:4]) + 4
        if head[4:] in (b"iTXt", b"zTXt", b"tEXt") and length < _MOST_TEXT:
            keyword, _, text = file.read(length).partition(b"\0")
            if head[4:] == b"iTXt" and keyword == b"XML:com.adobe.xmp":
                content = text[2:].split(b"\0", 2)[-1]  # after the flags, the language and the translated keyword
                packets.append(_inflate(content) if text[:1] == b"\1" else content)
            elif keyword.decode("latin-1") in _PNG_PROFILES:
                packets.append(_unhex((_inflate(text[1:]) if head[4:] == b"zTXt" else text).decode("latin-1")))
        file.seek(after)
    file.seek(before)
    return packets


def _unhex(profile: str) -> bytes:
    """What a raw profile of ImageMagick holds: its name, its length, and its bytes in hex."""
    try:
        _, _, content = profile.split(maxsplit=2)
        return bytes.fromhex(content).removeprefix(_JPEG_XMP)
    except ValueError:
        return b""


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MOST_TEXT)
    except zlib.error:
        return b""


def _jpeg_2000_packets(image: Image.Image) -> list[bytes]:
    """Of the boxes of a JPEG 2000 file that is not decoded yet, which Pillow does not look into (ISO 15444-1, I.4)."""
    file = getattr(image, "fp", None)
    if image.format != "JPEG2000" or file is None or not getattr(image, "tile", None):
        return []
    before, start, packets = file.tell(), 0, []
    while True:
        file.seek(start)
        head = file.read(24)
        length = int.from_bytes(head[:4])
        if len(head) < 24 or length < 8:  # the last one, or one of more than 4 GiB: the pixels
            break
        if head[4:] == b"uuid" + _JPEG_2000_XMP and length < _MOST_TEXT:
            packets.append(file.read(length - 24))
        start += length
    file.seek(before)
    return packets


def _decoded(packet: bytes) -> str:
    """The text of a packet in UTF-8, UTF-16 or UTF-32, with a mark of the order of its bytes or without."""
    for mark, encoding in _ENCODINGS.items():
        if packet.startswith(mark):
            return packet.decode(encoding, "replace")
    return packet.decode("utf-8", "replace")


def _values(text: str) -> list[tuple[str, str]]:
    """Names and values of the Photo Sphere properties in a packet; they are attributes or elements."""
    if "<!DOCTYPE" in text:
        raise ElementTree.ParseError("a document type is not allowed")
    found = []
    packet = text[text.index("<") : text.rindex(">") + 1]
    for element in ElementTree.fromstring(packet).iter():  # noqa: S314 - without a document type there are no entities
        for key, value in (*element.attrib.items(), (element.tag, element.text or "")):
            if (match := _NAMESPACE.fullmatch(key)) and value.strip():
                found.append((match[1], value.strip()))
    return found


def _is_same(value: str, other: str) -> bool:
    both_numbers = _is_number(value) and _is_number(other)
    return float(value) == float(other) if both_numbers else value.lower() == other.lower()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
