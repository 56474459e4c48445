"""Photo Sphere data: what a file says about which part of the sphere it shows, and how its camera was held."""

import math
import re
import warnings
from dataclasses import dataclass
from xml.etree import ElementTree

from PIL import Image

# A prefix is only a name (writers use GPano, ns2, …); some leave the last slash out.
_NAMESPACE = re.compile(r"\{https?://ns\.google\.com/photos/1\.0/panorama/?\}(\w+)")
_MENTIONED = re.compile(r"ns\.google\.com/photos/1\.0/panorama|GPano")


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
    """

    full: tuple[int, int] | None
    crop: tuple[int, int] | None
    top: int = 0
    left: int = 0
    heading: float | None = None
    pitch: float = 0.0
    roll: float = 0.0


def photo_sphere_of(packets: list[bytes], name: str) -> PhotoSphere | None:
    """What XMP packets say, `None` where that is nothing; what cannot be understood is warned about.

    Args:
        packets: each as its file has it.
        name: of the file, for messages.
    """
    found: dict[str, str] = {}
    for packet in packets:
        text = packet.decode("utf-8", "replace")
        if not _MENTIONED.search(text):
            continue
        try:
            found |= _values(text)
        except (ElementTree.ParseError, ValueError) as error:
            warnings.warn(f"the Photo Sphere data of {name} cannot be read, ignored: {error}", stacklevel=4)
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
    return PhotoSphere(full, crop, top, left, heading, pitch, roll)  # type: ignore[arg-type]


def xmp_packets(image: Image.Image) -> list[bytes]:
    """All XMP of an opened image, as its file has it."""
    packets = [image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")]
    return [packet.encode() if isinstance(packet, str) else bytes(packet) for packet in packets if packet]


def _values(text: str) -> dict[str, str]:
    """Name -> value of the Photo Sphere properties in a packet; they are attributes or elements."""
    if "<!DOCTYPE" in text:
        raise ElementTree.ParseError("a document type is not allowed")
    found: dict[str, str] = {}
    for element in ElementTree.fromstring(text[text.index("<") : text.rindex(">") + 1]).iter():
        for key, value in (*element.attrib.items(), (element.tag, element.text or "")):
            if (match := _NAMESPACE.fullmatch(key)) and value.strip():
                found[match[1]] = value.strip()
    return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
