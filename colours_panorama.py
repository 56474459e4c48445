"""Colours: what an image's ICC profile says they are, as sRGB."""

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_SEEN = 2  # levels of 255: a profile that changes no colour by more is sRGB
_INPUT = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour spaces of profiles, as Pillow's modes


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of 8 bit in the colours of its profile, as RGB or RGBA in sRGB; relative colorimetric with black point
    compensation, by LittleCMS. As it is where there is no profile, or one of sRGB, of another colour space or broken.
    """
    found = None if not profile else _transform(profile)
    if found is None:
        return image
    transform, mode = found
    if mode != "RGB" and image.mode.removesuffix("A") != mode:
        return image
    colours = image if image.mode == mode else image.convert(mode)
    converted = ImageCms.applyTransform(colours, transform)
    if converted is not None and image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted or image


def is_srgb(profile: bytes | None) -> bool:
    """Whether nothing is to be converted."""
    return not profile or _transform(profile) is None


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[Any, str] | None:
    """What turns the colours of a profile into sRGB, and the mode that it takes; `None` where they are sRGB."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _INPUT.get(own.profile.xcolor_space.strip())
        if mode is None:
            return None
        transform = ImageCms.buildTransform(
            *(own, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC),
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode != "CMYK":
            grid = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), -1).reshape(-1, 16, 3)
            swatches = Image.fromarray(grid) if mode == "RGB" else Image.fromarray(grid[..., 0])
            shown = ImageCms.applyTransform(swatches, transform)
            if np.abs(np.asarray(shown, int) - np.asarray(swatches.convert("RGB"), int)).max() <= _SEEN:
                return None
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError, ImportError) as error:
        warnings.warn(f"a colour profile cannot be read, ignored: {error}", stacklevel=2)
        return None
    return transform, mode
