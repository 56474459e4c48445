"""Samples: which ones there are to train and to validate on, and in which order they are seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import IterableDataset
from numpy.lib.recfunctions import repack_fields

from ..stages_panorama import STAGES
from .reader import SharedSource, StreamReader
from .rows import ERROR, RawSample
from .sources import DataSource, OpenedSource, digest, identity, open_source, try_panoramas


def open_data(
    sources: Sequence[DataSource], *, stage: str, seed: int, validation_share: float = 0.0
) -> tuple[Samples, Samples | None]:
    """Find the samples for training and validation.

    Args:
        sources: what is mixed.
        stage: in `vision` each distinct panorama is one sample, and needs no text.
        seed: of the split.
        validation_share: the share of the panoramas that is kept for validation, in [0, 1); a panorama and all that is
            said of it is in one of the two. Panoramas are the same where their file is (or its content, for images that
            a dataset holds).

    Raises:
        ValueError: for what is wrong as a whole: no such file, columns missing, no samples. A bad row is skipped later.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share must be in [0, 1), got {validation_share}. Typical value: 0.05")
    if not sources:
        raise ValueError("sources is empty: give at least one DataSource")
    opened = [open_source(source, stage) for source in sources]
    if any(isinstance(each.data, IterableDataset) for each in opened):
        limit = int(validation_share * 2**64)
        train = Samples(opened, stage, held_out=(seed, limit, False))
        return train, Samples(opened, stage, held_out=(seed, limit, True)) if limit else None

    if stage == "vision" or validation_share:
        places = np.concatenate([_places(each, source) for source, each in enumerate(opened)])
    else:  # without a split or duplicates to find, images are not read
        places = np.concatenate([_numbered(len(each.data), source) for source, each in enumerate(opened)])
    held = _held_out(places["panorama"], seed, validation_share) if validation_share else np.zeros(0, np.uint64)
    in_held = np.isin(places["panorama"], held)
    if stage == "vision":  # each panorama where it is first named, and rows without one, to be reported
        _, first = np.unique(places["panorama"], return_index=True)
        own = places["panorama"] == _NONE
        own[first] = True
        kept = {"train": own & ~in_held, "validation": own & in_held}
    else:  # a row with panoramas of both sides is in neither
        starts = np.flatnonzero(places["image"] == 0)
        kept = {"train": np.zeros(len(places), bool), "validation": np.zeros(len(places), bool)}
        kept["train"][starts] = ~np.logical_or.reduceat(in_held, starts)
        kept["validation"][starts] = np.logical_and.reduceat(in_held, starts)
    entries = {name: repack_fields(places[mask][list(_ENTRY.names or ())]) for name, mask in kept.items()}
    train = Samples(opened, stage, entries["train"])
    return train, Samples(opened, stage, entries["validation"], weighted=False) if validation_share else None


_ENTRY = np.dtype([("source", "<u2"), ("image", "<u2"), ("row", "<u4")])  # 8 bytes a sample
_PLACE = np.dtype([*_ENTRY.descr, ("panorama", "<u8")])
_NONE = 0  # the panorama of a row that has none


def _numbered(rows: int, source: int) -> np.ndarray:
    places = np.zeros(rows, _PLACE)
    places["source"], places["row"] = source, np.arange(rows)
    return places


def _places(opened: OpenedSource, source: int) -> np.ndarray:
    """Each image of each row of a source, with a number that tells its panorama from others; a row without an image
    once, with `_NONE`."""
    found, start = [_numbered(0, source)], 0
    needed = [name for name in (opened.columns["image"], ERROR) if name in opened.data.column_names]
    for batch in opened.data.select_columns(needed).iter(batch_size=1000):
        rows = [dict(zip(needed, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        triples = [
            (source, which, start + place, _NONE if image is None else int(digest(identity(image)), 16))
            for place, row in enumerate(rows)
            for which, image in enumerate(try_panoramas(opened, row) or [None])
        ]
        found.append(np.array(triples, _PLACE))
        start += len(rows)
    return np.concatenate(found)


def _held_out(panoramas: np.ndarray, seed: int, share: float) -> np.ndarray:
    """The panoramas that are kept for validation: by the order in which rows name them, wherever their files lie."""
    named = panoramas[panoramas != _NONE]
    distinct = named[np.sort(np.unique(named, return_index=True)[1])]
    count = max(1, round(share * len(distinct)))
    if count >= len(distinct):
        raise ValueError(
            f"validation_share={share} of {len(distinct)} panoramas leaves none to train on; "
            "give more panoramas or a smaller share"
        )
    return distinct[np.random.default_rng(seed).permutation(len(distinct))[:count]]


class Samples:
    """Samples of one or more sources, read when asked for, their images undecoded.

    Map-style: `len(samples)` distinct samples, `samples[i]`. With a stream among the sources: no length, `stream()`.
    A raw sample is a dict of `image` (stage `vision`) or `messages`, `name`, `source`, `index`, where several answers
    are right, `answers` (messages, any of which may be the last one), and, where it cannot be used, `error`.
    """

    def __init__(
        self,
        opened: list[OpenedSource],
        stage: str,
        entries: np.ndarray | None = None,
        held_out: tuple[int, int, bool] = (0, 0, False),
        weighted: bool = True,
    ):
        self.opened = opened
        self.stage = stage
        self.streaming = entries is None
        self.entries = np.zeros(0, _ENTRY) if entries is None else entries  # [N] of source, row and image of the row
        self.held_out = held_out  # for streams: seed, limit of the hash, on which side of it
        self.weighted = weighted

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a stream has no length")
        return len(self.entries)

    def __getitem__(self, index: int) -> RawSample:
        """Sample `index % len(self)`; higher indices are its repetitions in an epoch."""
        entry = self.entries[index % len(self)]
        opened, row = self.opened[entry["source"]], int(entry["row"])
        return {**opened.sample(opened.data[row], self.stage, f"row {row}", int(entry["image"])), "index": index}

    def __iter__(self) -> Iterator[RawSample]:
        """All samples once; of a stream, without end."""
        return iter(self.reader()) if self.streaming else (self[index] for index in range(len(self)))

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch, in order: each sample as often as its source's weight says."""
        generator = np.random.default_rng((seed, epoch, 0))
        indices = []
        for source, opened in enumerate(self.opened):
            own = np.flatnonzero(self.entries["source"] == source)
            times, share = divmod(opened.source.weight if self.weighted else 1.0, 1)
            indices += [own + len(self) * time for time in range(int(times))]
            drawn = generator.choice(own, round(share * len(own)), replace=False)
            indices.append(np.sort(drawn) + len(self) * int(times))
        return np.concatenate(indices)

    def lengths(self) -> np.ndarray:
        """Characters of the texts of each sample, [N]; zeros in stage `vision`."""
        lengths = np.zeros(len(self), dtype=np.int64)
        for source, opened in enumerate(self.opened):
            text = [column for what, column in opened.columns.items() if what != "image"]
            if text:
                batches = opened.data.select_columns(text).iter(batch_size=1000)
                rows = (values for batch in batches for values in zip(*batch.values(), strict=True))
                sizes = np.fromiter((sum(len(str(value)) for value in values) for values in rows), np.int64)
                own = self.entries["source"] == source
                lengths[own] = sizes[self.entries["row"][own]]
        return lengths

    def reader(self, seed: int = 0, shuffle: bool = False, part: tuple[int, int] = (0, 1)) -> StreamReader:
        """The samples without end, or the part (number, of how many) of them that one reader has."""
        sources = [SharedSource(each, self.stage, self.held_out, seed, shuffle, part) for each in self.opened]
        return StreamReader(sources, seed, part[0])
