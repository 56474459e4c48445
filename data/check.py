"""The check of a source before it is trained on: what it is, what of it can be used, and why the rest cannot."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset
from PIL import ExifTags
from PIL import Image as PILImage

from ..placing_panorama import covered_by_size
from ..processing_panorama import IMAGE_TOKEN
from ..projections_panorama import Projection
from ..reading_panorama import open_image, read_photo_sphere, shape_of
from .collators import BAD_INPUT, images_of, where_it_lies
from .files import panoramas_in, said_of
from .rows import BadSample, RawSample, check_said
from .sources import DataSource, OpenedSource, SyntheticSource, identity, open_source, try_panoramas, what_it_is

_STREAMED = 1000  # rows of a stream, of which nobody knows how many there are
_RENDERED = 20  # scenes, which are rendered to be looked at
_THREADS = 8  # that open images: a network's disk is waited for


class Seen(NamedTuple):
    """An image by its header.

    Args:
        size: (width, height) in pixels, as it is shown; `None` where it was not looked at.
        kind: which part of the sphere it shows, and what says so.
        problem: why it cannot be used.
    """

    size: tuple[int, int] | None = None
    kind: str = ""
    problem: str | None = None


@dataclass
class Report:
    """What a check found.

    Attributes:
        what: the source is.
        stage: that it was opened for.
        columns: of the data, by what they hold.
        note: why it does not serve the other stages.
        rows: that were looked at, and of how many (`None`: a stream).
        samples: that they give, good and bad.
        bad: reasons, as `kind: details` of the first of each kind, with how many there are.
        kinds, sizes: of the distinct panoramas.
        left_out: files of the folder that are no samples, in words.
        examples: the first three good samples.
        warned: what the reader warns about, with how often.
        max_bad_share: bad samples among all, above which training fails.
    """

    what: str
    stage: str
    columns: dict[str, str]
    note: str = ""
    rows: tuple[int, int | None] = (0, None)
    samples: int = 0
    bad: dict[str, tuple[str, int]] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    left_out: str = ""
    examples: list[str] = field(default_factory=list)
    warned: dict[str, int] = field(default_factory=dict)
    max_bad_share: float = 0.1

    @property
    def failure(self) -> str | None:
        """Why training would fail; `None` where nothing says so."""
        bad = sum(count for _, count in self.bad.values())
        if bad <= self.max_bad_share * self.samples and self.samples > 0:
            return None
        return (
            f"{bad} of {self.samples} samples cannot be used, more than the allowed share of {self.max_bad_share:g} "
            "(max_bad_share)"
        )

    def __str__(self) -> str:
        bad = sum(count for _, count in self.bad.values())
        looked, all_rows = self.rows
        lines = [
            f"{self.what}; {', '.join(f'{what}: {column!r}' for what, column in self.columns.items())}",
            f"stage {self.stage}: {self.samples:,} samples in {looked:,} rows"
            + ("" if looked == all_rows else f" (of {all_rows:,})" if all_rows else " (the first of a stream)")
            + f", {self.kinds.total():,} panoramas; {bad:,} cannot be used",
        ]
        lines += [self.note] if self.note else []
        lines += [f"  {count:,} of {reason}" if count > 1 else f"  {reason}" for reason, count in self.bad.values()]
        lines += [f"left out: {self.left_out}"] if self.left_out else []
        lines += [f"panoramas: {count:,} {kind}" for kind, count in self.kinds.most_common()]
        sizes = [f"{width} x {height} ({count:,})" for (width, height), count in self.sizes.most_common(8)]
        lines += [f"sizes: {', '.join(sizes)}" + (", …" if len(self.sizes) > 8 else "")] if sizes else []
        lines += [f"warning ({count:,} like it): {words}" for words, count in self.warned.items()]
        return "\n".join([*lines, *self.examples])


def check_source(
    source: DataSource, stage: str | None = None, *, rows: int | None = None, max_bad_share: float = 0.1
) -> Report:
    """Open a source as the trainer does, and look at every sample without decoding an image.

    What only decoding shows (a file that is cut off), and the length of a text in tokens, is not seen.

    Args:
        source: as the trainer has it.
        stage: `vision`, `resampler` or `finetune`; without it `finetune`, and `vision` where the source has no texts.
        rows: how many, spread evenly over the source (the first of a stream); all of them without it, of a stream
            1,000, of rendered scenes 20.
        max_bad_share: as the trainer's.

    Raises:
        ValueError: for a source that the trainer would refuse.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}; leave it out to look at all")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share must be in [0, 1], got {max_bad_share}. Typical value: 0.1")
    opened, stage, note = _opened(source, stage)
    columns = {} if isinstance(opened, SyntheticSource) else opened.columns
    report = Report(what_it_is(source), stage, columns, note=note, max_bad_share=max_bad_share)
    seen: dict[str, Seen] = {}
    named: set[str] = set()
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("always")
        for batch in _batches(opened, rows, report):
            samples = [sample for name, row in batch for sample in _samples(opened, row, stage, name, named)]
            images = {_key(image, sample): (image, sample) for sample in samples for image in images_of(sample)}
            new = [key for key in images if key not in seen]
            seen.update(zip(new, pool.map(_look, (images[key] for key in new)), strict=True))
            for sample in samples:
                _count(report, sample, [seen[_key(image, sample)] for image in images_of(sample)])
    good = [each for each in seen.values() if each.problem is None]
    report.kinds.update(each.kind for each in good)
    report.sizes.update(each.size for each in good if each.size is not None)
    places: dict[tuple[str, int], list[str]] = {}
    for warning in caught:
        places.setdefault((warning.filename, warning.lineno), []).append(str(warning.message))
    report.warned = {words[0]: len(words) for words in places.values()}
    report.left_out = _left_out(report, opened, seen)
    return report


def _opened(source: DataSource, stage: str | None) -> tuple[OpenedSource, str, str]:
    """The source, its stage, and, where that is `vision` as it has no columns for another, in words why."""
    if stage is not None:
        return open_source(source, stage), stage, ""
    vision = open_source(source, "vision")
    try:
        return open_source(source, "finetune"), "finetune", ""
    except ValueError as error:
        return vision, "vision", f"it serves stage vision alone: {error}"


def _batches(opened: OpenedSource, rows: int | None, report: Report) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The rows to look at, with their names, by the thousand."""
    data, numbers = opened.data, None
    if isinstance(data, Dataset):
        count = min(len(data), rows or (_RENDERED if isinstance(opened, SyntheticSource) else len(data)))
        report.rows = (count, len(data))
        if count < len(data):
            numbers = [place * len(data) // count for place in range(count)]
            data = data.select(numbers)
    else:
        data = data.take(rows or _STREAMED)
    start = 0
    for batch in data.iter(batch_size=1000):
        taken = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        yield [(f"row {start + i if numbers is None else numbers[start + i]}", row) for i, row in enumerate(taken)]
        start += len(taken)
    if not isinstance(data, Dataset):
        report.rows = (start, None)


def _samples(opened: OpenedSource, row: dict[str, Any], stage: str, name: str, named: set[str]) -> Iterator[RawSample]:
    """The samples of a row; in stage `vision` each panorama is one where it is first named."""
    images = try_panoramas(opened, row) if stage == "vision" else []
    if not images:
        yield opened.sample(row, stage, name)
    for which, image in enumerate(images):
        if (key := identity(image)) not in named:
            named.add(key)
            yield opened.sample(row, stage, name, which)


def _key(image: Any, sample: RawSample) -> str:
    return identity(image) if isinstance(image, str | bytes) else str(sample["name"])


def _look(of: tuple[Any, RawSample]) -> Seen:
    """What the header of an image says."""
    image, sample = of
    try:
        if isinstance(image, str) and (where := where_it_lies(image, sample)) != "file":
            return Seen(kind=f"not looked at, they lie on the {where}")
        opened = open_image(image)
        try:
            return Seen(opened.size, _kind(opened, sample.get("projection")))
        finally:
            if opened is not image:
                opened.close()
    except BAD_INPUT as error:
        name = image if isinstance(image, str) else "in bytes"
        return Seen(problem=str(error) if isinstance(error, BadSample) else f"unreadable image: {name}: {error}")


def _kind(image: PILImage.Image, projection: str | None) -> str:
    """Which part of the sphere an image shows, and what says so; `projection` is what its source says it is."""
    width, height = image.size
    if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # it is turned upright
        width, height = height, width
    shape = Projection.parse(projection)
    if shape.name != "equirectangular":
        shape.check_size(height, width)
        return f"{shape.name}, as the source says"
    sphere = read_photo_sphere(image)
    if sphere is not None and projection is None and shape_of(sphere).name != "equirectangular":
        return f"{sphere.projection}, by their Photo Sphere data"
    if sphere is not None and sphere.full is not None:
        part = "whole spheres" if sphere.crop in (None, sphere.full) else "parts of the sphere"
        return f"{part}, by their Photo Sphere data"
    if covered_by_size(height, width) is None:
        return "whole spheres, by their size of 2:1"
    return "guessed to be a band of the sphere: not 2:1, and no Photo Sphere data"


def _count(report: Report, sample: RawSample, seen: list[Seen]) -> None:
    """Take a sample into the report."""
    report.samples += 1
    reason = sample.get("error") or next((each.problem for each in seen if each.problem), None)
    if reason is None and "messages" in sample:
        try:
            check_said(sample["messages"])
        except BadSample as error:
            reason = str(error)
    if reason is not None:
        kind = reason.split(":")[0]
        first, count = report.bad.get(kind, (f"{reason} ({sample['name']})", 0))
        report.bad[kind] = (first, count + 1)
    elif len(report.examples) < 3:
        report.examples.append(_example(sample, seen))


def _example(sample: RawSample, seen: list[Seen]) -> str:
    """A sample in a few lines."""
    names = [os.path.basename(image) if isinstance(image, str) else "in the data" for image in images_of(sample)]
    sizes = ["" if each.size is None else f" ({each.size[0]} x {each.size[1]})" for each in seen]
    lines = [f"{sample['name']}: " + ", ".join(map("".join, zip(names, sizes, strict=True)))]
    for message in sample.get("messages", [])[:4]:
        words = " ".join(part.get("text") or IMAGE_TOKEN for part in message["content"]).replace("\n", " ")
        lines.append(f"  {message['role']}: {words if len(words) < 200 else words[:199] + '…'}")
    if "answers" in sample:
        lines.append(f"  … or one of {len(sample['answers']) - 1} other answers")
    return "\n".join(lines)


def _left_out(report: Report, opened: OpenedSource, seen: dict[str, Seen]) -> str:
    """Files of the source's own folder that are no samples."""
    if opened.root is None or not report.what.startswith(("folder of images", "folder with metadata")):
        return ""
    panoramas, left_out = panoramas_in(opened.root)
    if report.what.startswith("folder with metadata"):
        unnamed = [path for path in panoramas if identity(path) not in seen]
        whole = report.rows[0] == report.rows[1]
        left_out = {"panoramas that no row names": unnamed} if unnamed and whole else {}
    return said_of(left_out)
