"""Files: which of a folder are panoramas, and which one a row means."""

from __future__ import annotations

import importlib.util
import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote, urlsplit

PANORAMAS = (  # endings of files that may hold one; `.insp` is the JPEG of a camera with two lenses
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".insp", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pnm", ".exr", ".hdr"),
)


_OF_SYSTEMS = ("__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin")


def is_panorama(name: str) -> bool:
    """Whether a file of this name may hold a panorama."""
    return name.lower().endswith(PANORAMAS)


def is_hidden(name: str) -> bool:
    """Whether what has this name was put beside the data by a system (`._park.jpg`, `Thumbs.db`) or is hidden."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def list_folder(folder: str | os.PathLike[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The files of a folder and of those inside of it, sorted, and what is left out: reason -> paths."""
    found: list[str] = []
    left_out: dict[str, list[str]] = {"hidden or of the system": [], "links to folders": [], "cannot be read": []}
    hidden, links, unreadable = left_out.values()
    for parent, folders, names in os.walk(folder, onerror=lambda error: unreadable.append(str(error.filename))):
        hidden += [os.path.join(parent, name) for name in (*folders, *names) if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
        found += [os.path.join(parent, name) for name in names if not is_hidden(name)]
    return sorted(found), {reason: paths for reason, paths in left_out.items() if paths}


def panoramas_in(folder: str | os.PathLike[str]) -> tuple[list[str], dict[str, list[str]]]:
    """As `list_folder`, the files that are panoramas by their names."""
    found, left_out = list_folder(folder)
    others: dict[str, list[str]] = {}
    for path in found:
        if not is_panorama(path):
            others.setdefault(os.path.splitext(path)[1].lower() or "without an ending", []).append(path)
    named = {f"no panoramas ({ending})": paths for ending, paths in others.items()}
    return [path for path in found if is_panorama(path)], {**left_out, **named}


def said_of(left_out: dict[str, list[str]]) -> str:
    """What is left out in words, the commonest first."""
    by_number = sorted(left_out.items(), key=lambda each: -len(each[1]))
    return "; ".join(f"{len(paths)} {reason}, such as {os.path.basename(paths[0])!r}" for reason, paths in by_number)


def spellings(name: str) -> list[str]:
    """A name, and the same in the other forms of Unicode (macOS takes accents apart, most else does not)."""
    if name.isascii():
        return [name]
    return list(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def existing(path: str) -> str:
    """A path, `~` expanded, in the form of Unicode in which it exists, if it does."""
    forms = spellings(os.path.expanduser(path))
    return next(filter(os.path.exists, forms), forms[0])


def package_path(path: str) -> str:
    """`PACKAGE:PATH` is a path inside an installed Python package; any other path stays, `~` expanded."""
    match = re.fullmatch(r"(\w{2,}):(.*)", path)
    if match is None or "//" in path:
        return os.path.expanduser(path)
    spec = importlib.util.find_spec(match[1])
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ValueError(f"{path!r} names the package {match[1]!r}, which is not installed: pip install it")
    paths = [Path(folder, match[2]) for folder in folders]
    return str(next((path for path in paths if path.exists()), paths[0]))


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
