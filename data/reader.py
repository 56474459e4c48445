"""Streams: what one of several readers sees of data that is read while training, and where it goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from .rows import RawSample
from .sources import OpenedSource, digest, identity, try_panoramas

_BLOCK = 200  # rows of a stream, with their undecoded images, that are put into a new order among themselves


class SharedSource:
    """One reader's share of a source, pass after pass without end.

    Of a source of at least as many shards (files, as a rule) as there are readers, each opens its own ones alone;
    where there are fewer, some read the same ones and take turns at the rows. Shards come in a new order in each pass,
    and so do the rows within blocks of 200. In stage `vision` a panorama counts once a block.

    Args:
        opened: the source.
        stage: as in `open_data`.
        held_out: seed, limit of the hash, and on which side of it panoramas are taken.
        seed: of the order.
        shuffle: whether there is one.
        part: which reader this is, of how many.
    """

    def __init__(
        self,
        opened: OpenedSource,
        stage: str,
        held_out: tuple[int, int, bool],
        seed: int,
        shuffle: bool,
        part: tuple[int, int],
    ):
        self.opened, self.stage, self.held_out = opened, stage, held_out
        self.seed, self.shuffle, self.part = seed, shuffle, part
        self.state: dict[str, Any] = {"pass": 0, "shard": 0, "block": 0, "given": 0, "rows": None}

    def __iter__(self) -> Iterator[RawSample]:
        """Samples from where `state` says; it is brought up to date before each."""
        while True:
            given = self.state["shard"] > 0 or self.state["block"] > 0 or self.state["given"] > 0
            for sample in self._pass(self.state["pass"]):
                given = True
                yield sample
            if not given:
                what = "validation" if self.held_out[2] else "training"
                raise ValueError(
                    f"{self.opened.source.path!r} has no samples for {what} in the share of reader {self.part[0]} of "
                    f"{self.part[1]}: take fewer processes or num_workers, or another validation_share"
                )
            self.state = {"pass": self.state["pass"] + 1, "shard": 0, "block": 0, "given": 0, "rows": None}

    def _pass(self, number: int) -> Iterator[RawSample]:
        shards = self._shards(number)
        for place in range(self.state["shard"], len(shards)):
            which, rows, step, offset = shards[place]
            before = self.state["rows"]
            if before is not None:
                rows.load_state_dict(before)
            batches = rows.iter(batch_size=1)
            for block in itertools.count(self.state["block"]):
                taken = [{name: values[0] for name, values in row.items()} for row in itertools.islice(batches, _BLOCK)]
                if not taken:
                    break
                names = [(block * _BLOCK + i) * step + offset for i in range(len(taken))]
                samples = [
                    {**sample, "epoch": number}
                    for row, name in zip(taken, names, strict=True)
                    for sample in self._samples(row, f"row {name} of shard {which}")
                ]
                samples = self._mixed(samples, (number, which, block))
                for given in range(self.state["given"], len(samples)):
                    self.state = {"pass": number, "shard": place, "block": block, "given": given + 1, "rows": before}
                    yield samples[given]
                before = rows.state_dict()
                self.state = {"pass": number, "shard": place, "block": block + 1, "given": 0, "rows": before}
            self.state = {"pass": number, "shard": place + 1, "block": 0, "given": 0, "rows": None}

    def _shards(self, number: int) -> list[tuple[int, IterableDataset, int, int]]:
        """This reader's shards in the order of a pass: number, rows, every which of them from which on."""
        index, count = self.part
        data = self.opened.data
        if isinstance(data, Dataset):
            data = data.to_iterable_dataset(num_shards=min(count, len(data)))
        order = np.arange(data.num_shards)
        if self.shuffle:
            order = np.random.default_rng((self.seed, number, 2)).permutation(order)
        apart = max(each for each in range(1, count + 1) if count % each == 0 and each <= data.num_shards)
        step, offset = count // apart, index // apart
        shards = [(int(which), data.shard(data.num_shards, int(which))) for which in order[index % apart :: apart]]
        if step > 1:
            shards = [(which, split_dataset_by_node(shard, rank=offset, world_size=step)) for which, shard in shards]
        return [(which, shard, step, offset) for which, shard in shards]

    def _samples(self, row: dict[str, Any], name: str) -> list[RawSample]:
        """What a row gives to this side of the split."""
        split_seed, limit, held = self.held_out
        if self.stage != "vision" and not limit and not held:
            return [self.opened.sample(row, self.stage, name)]
        names = [identity(image) for image in try_panoramas(self.opened, row)]
        sides = [int(digest(f"{split_seed} {each}"), 16) < limit for each in names] or [False]
        if self.stage != "vision":  # a row with panoramas of both sides is in neither
            return [self.opened.sample(row, self.stage, name)] if set(sides) == {held} else []
        mine = [which for which, side in enumerate(sides) if side == held]
        return [
            {**self.opened.sample(row, self.stage, name, which), "panorama": names[which] if names else None}
            for which in mine
        ]

    def _mixed(self, samples: list[RawSample], block: tuple[int, int, int]) -> list[RawSample]:
        """The samples of a block, each panorama of stage `vision` once."""
        kept, seen = [], set()
        for sample in samples:
            name = sample.pop("panorama", None)
            if name is None or name not in seen:
                kept.append(sample)
            seen.add(name)
        if self.shuffle:
            order = np.random.default_rng((self.seed, *block, 3)).permutation(len(kept))
            kept = [kept[place] for place in order]
        return kept


class StreamReader:
    """One reader's share of several sources, drawn by their weights, without end.

    Args:
        sources: shares of them.
        seed: of the draws.
        number: of this reader.
    """

    def __init__(self, sources: list[SharedSource], seed: int, number: int):
        self.sources, self.seed, self.number = sources, seed, number
        weights = np.array([source.opened.source.weight for source in sources])
        self.upto = np.cumsum(weights / weights.sum())
        self.drawn = 0

    def __iter__(self) -> Iterator[RawSample]:
        iterators = [iter(source) for source in self.sources]
        while True:
            self.drawn += 1
            draw = np.random.default_rng((self.seed, self.number, self.drawn)).random() if len(iterators) > 1 else 0.0
            yield next(iterators[min(int(np.searchsorted(self.upto, draw, side="right")), len(iterators) - 1)])

    def state(self) -> dict[str, Any]:
        """Where it goes on, as JSON holds it."""
        return {"drawn": self.drawn, "sources": [source.state for source in self.sources]}

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on where another reader of the same share was."""
        self.drawn = state["drawn"]
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.state = own
