"""Samples: which ones there are to train and to validate on, and in which order they are seen."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from datasets import (
    IterableDataset,
    interleave_datasets,
)

from ..stages_panorama import STAGES
from .sources import DataSource, OpenedSource, RawSample, identity, open_source, try_panoramas

_STREAM_BUFFER = 200  # rows of a stream, with their undecoded images, among which the next one is drawn


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

    # The rows of each panorama. Without a split or duplicates to find, images are not read.
    rows: list[list[list[str]]] = [[[] for _ in range(len(each.data))] for each in opened]
    if stage == "vision" or validation_share:
        images = [each.data.select_columns([each.columns["image"]]) for each in opened]
        rows = [
            [[identity(image) for image in try_panoramas(each, row)] for row in of_source]
            for each, of_source in zip(opened, images, strict=True)
        ]
    panoramas = sorted({name for of_source in rows for names in of_source for name in names})
    held: set[str] = set()
    if validation_share:
        count = max(1, round(validation_share * len(panoramas)))
        if count >= len(panoramas):
            raise ValueError(
                f"validation_share={validation_share} of {len(panoramas)} panoramas leaves none to train on; "
                "give more panoramas or a smaller share"
            )
        held = {panoramas[place] for place in np.random.default_rng(seed).permutation(len(panoramas))[:count]}
    train_entries: list[tuple[int, int, int]] = []
    validation_entries: list[tuple[int, int, int]] = []
    seen: set[str] = set()
    for source, of_source in enumerate(rows):
        for row, names in enumerate(of_source):
            if stage == "vision":
                for which, name in enumerate(names):
                    if name not in seen:
                        (validation_entries if name in held else train_entries).append((source, row, which))
                        seen.add(name)
                if not names:  # to be reported
                    train_entries.append((source, row, 0))
            elif not held.intersection(names):
                train_entries.append((source, row, 0))
            elif held.issuperset(names):
                validation_entries.append((source, row, 0))  # a row with panoramas of both sides is in neither
    train = Samples(opened, stage, train_entries)
    return train, Samples(opened, stage, validation_entries, weighted=False) if held else None


class Samples:
    """Samples of one or more sources, read when asked for, their images undecoded.

    Map-style: `len(samples)` distinct samples, `samples[i]`. With a stream among the sources: no length, `stream()`.
    A raw sample is a dict of `image` (stage `vision`) or `messages`, `name`, `source`, `index` and, where it cannot be
    used, `error`.
    """

    def __init__(
        self,
        opened: list[OpenedSource],
        stage: str,
        entries: list[tuple[int, int, int]] | None = None,
        held_out: tuple[int, int, bool] = (0, 0, False),
        weighted: bool = True,
    ):
        self.opened = opened
        self.stage = stage
        self.streaming = entries is None
        self.entries = np.array(entries or [], dtype=np.int64).reshape(-1, 3)  # [N, (source, row, image of the row)]
        self.held_out = held_out  # for streams: seed, limit of the hash, on which side of it
        self.weighted = weighted

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a stream has no length")
        return len(self.entries)

    def __getitem__(self, index: int) -> RawSample:
        """Sample `index % len(self)`; higher indices are its repetitions in an epoch."""
        source, row, which = (int(number) for number in self.entries[index % len(self)])
        opened = self.opened[source]
        return {**opened.sample(opened.data[row], self.stage, f"row {row}", which), "index": index}

    def __iter__(self) -> Iterator[RawSample]:
        """All samples once; of a stream, without end."""
        if self.streaming:
            return (pickle.loads(row["sample"]) for row in self.stream(0, shuffle=False))
        return (self[index] for index in range(len(self)))

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch, in order: each sample as often as its source's weight says."""
        generator = np.random.default_rng((seed, epoch, 0))
        indices = []
        for source, opened in enumerate(self.opened):
            own = np.flatnonzero(self.entries[:, 0] == source)
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
                sizes = np.array([sum(len(str(v)) for v in row.values()) for row in opened.data.select_columns(text)])
                own = self.entries[:, 0] == source
                lengths[own] = sizes[self.entries[own, 1]]
        return lengths

    def stream(self, seed: int, shuffle: bool = True) -> IterableDataset:
        """The samples without end, each pickled under the key `sample` (so that `datasets` does not force them into one
        schema): pass after pass, shuffled anew in each, drawn from the sources by their weights. A sample carries its
        pass as `epoch`."""
        streams = [
            IterableDataset.from_generator(partial(_passes, opened, self.stage, self.held_out, seed, shuffle))
            for opened in self.opened
        ]
        weights = np.array([opened.source.weight for opened in self.opened])
        return interleave_datasets(streams, probabilities=list(weights / weights.sum()), seed=seed)


def _passes(
    opened: OpenedSource, stage: str, held_out: tuple[int, int, bool], seed: int, shuffle: bool
) -> Iterator[dict[str, bytes]]:
    """A source as an endless stream. Each worker reads all of it (`iter` does not share it out among workers), so that
    the order does not depend on their number."""
    split_seed, limit, held = held_out
    rows = opened.data if isinstance(opened.data, IterableDataset) else opened.data.to_iterable_dataset()
    for number in itertools.count():
        shuffled = rows.shuffle(seed=seed + number, buffer_size=_STREAM_BUFFER) if shuffle else rows
        seen: set[str] = set()
        given = False
        for place, columns in enumerate(shuffled.iter(batch_size=1)):
            row = {column: values[0] for column, values in columns.items()}
            names = [identity(image) for image in try_panoramas(opened, row)]
            hashes = [hashlib.blake2b(f"{split_seed} {name}".encode(), digest_size=8).digest() for name in names]
            sides = [int.from_bytes(each, "big") < limit for each in hashes] or [False]
            if stage == "vision":
                new = [i for i, side in enumerate(sides) if side == held and not (names and names[i] in seen)]
                seen.update(names)
            else:
                new = [0] if set(sides) == {held} else []  # a row with panoramas of both sides is in neither
            for which in new:
                given = True
                raw = opened.sample(row, stage, f"row {place} of pass {number}", which)
                yield {"sample": pickle.dumps({**raw, "epoch": number})}
        if not given:
            raise ValueError(f"{opened.source.path!r} has no samples for {'validation' if held else 'training'}")
