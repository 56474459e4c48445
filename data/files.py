"""Files: which one a row means."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

PANORAMAS = (  # endings of files that may hold one; `.insp` is the JPEG of a camera with two lenses
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".insp", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pnm", ".exr", ".hdr"),
)


def is_panorama(name: str) -> bool:
    """Whether a file of this name may hold a panorama."""
    return name.lower().endswith(PANORAMAS)


def names_in_url(url: str) -> list[str]:
    """The names under which what a URL names may lie in a folder, likeliest first: the last part of its path, as it
    stands there and decoded, then the same with what follows it (`?` and `#`), as some tools save it.

    Raises:
        ValueError: for what is no URL.
    """
    path = urlsplit(url).path.rsplit("/", 1)[-1]
    whole = url.partition("://")[2].partition("/")[2]
    whole = path + whole.partition(path)[2] if path else ""
    found = dict.fromkeys(each for name in (path, whole) for each in (name, unquote(name, errors="surrogateescape")))
    return [name for name in found if name not in ("", ".", "..") and not {"/", os.sep, "\0"} & set(name)]
