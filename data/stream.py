"""The optimizer steps of a run: what a step holds follows from the seed and its number alone, however it is spread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers.image_processing_utils import BatchFeature

from .rows import RawSample
from .samples import Samples

Collate = Callable[[list[RawSample], list[dict[str, Any]]], "BatchFeature | None"]
_Share = tuple[int, float, int, list[RawSample], dict[str, Any] | None]


@dataclass
class Step:
    """What one process needs for one optimizer step.

    Attributes:
        index: of the step, from 0.
        epoch: passes over the data that lie before it (whole ones for a stream).
        micro_batches: inputs of the model, [batch_size or less, ...]; none where all samples of this process are bad.
        skipped: the bad samples: `{"sample", "source", "reason", "step"}`.
        samples: good ones in `micro_batches`.
        seen: good and bad ones in the step, on all processes.
        names: what the good ones are called.
        state: of a stream, where its reader goes on after this step.
    """

    index: int
    epoch: float
    micro_batches: list[BatchFeature] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    samples: int = 0
    seen: int = 0
    names: list[str] = field(default_factory=list)
    state: dict[str, Any] | None = None

    def pin_memory(self) -> Step:
        """The same, in memory from which a GPU copies while it computes; `DataLoader` calls it."""
        batches = [BatchFeature({name: value.pin_memory() for name, value in b.items()}) for b in self.micro_batches]
        return replace(self, micro_batches=batches)


class BatchStream(torch.utils.data.IterableDataset):
    """The optimizer steps of a run, for `DataLoader(stream, batch_size=None, num_workers=n)`.

    A step takes `batch_size * world * accumulation` samples, the last one of an epoch what is left. Which ones and in
    which order follows from the seed and the step alone: sample j goes to process j % world, so neither processes,
    workers, accumulation nor a restart change what is learned from. Each step is made by one worker.

    Of a stream each worker of each process reads its own share, so what a step holds follows from their numbers, too. A
    run that goes on needs as many of both, and `states`: what `Step.state` was of the last step of each worker.

    Args:
        samples: of `open_data`.
        collate: a `VisionCollator` or `ConversationCollator`.
        batch_size: samples a process and micro-batch.
        accumulation: micro-batches a step.
        rank, world: this process, and how many there are.
        seed: of order and augmentation.
        epochs: passes over the samples, where `max_steps` does not say how many steps there are.
        max_steps: optimizer steps; a stream needs it.
        start_step: steps before it are not made.
        shuffle: a new order in each epoch.
        group_by_length: let the samples of a step be of similar length.
    """

    def __init__(
        self,
        samples: Samples,
        collate: Collate,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        epochs: float | None = 1.0,
        max_steps: int | None = None,
        start_step: int = 0,
        shuffle: bool = True,
        group_by_length: bool = False,
    ):
        if batch_size < 1 or accumulation < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size and accumulation must be at least 1 and rank in [0, world), got {batch_size}, "
                f"{accumulation} and rank {rank} of {world}"
            )
        if max_steps is None and (samples.streaming or not epochs):
            raise ValueError(
                "max_steps must say how many steps there are: "
                + ("a stream has no known length" if samples.streaming else f"epochs is {epochs}")
            )
        if samples.streaming and group_by_length:
            raise ValueError("group_by_length needs samples of known length, not a stream; leave it out")
        self.samples, self.collate = samples, collate
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.seed, self.start_step, self.shuffle = seed, start_step, shuffle
        self.global_batch = batch_size * world * accumulation
        self.states: dict[int, dict[str, Any]] = {}  # of a stream: step % workers -> state
        self.lengths = samples.lengths() if group_by_length else None
        self.epoch_samples = 0 if samples.streaming else len(samples.epoch(seed, 0))  # 0: not known
        if not samples.streaming and self.epoch_samples == 0:
            raise ValueError("an epoch has no samples; raise the weights of the sources")
        whole, part = divmod(epochs or 0.0, 1)
        in_epochs = int(whole) * self.epoch_steps + math.ceil(round(part * self.epoch_steps, 6))
        self.steps = in_epochs if max_steps is None else max_steps

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps an epoch."""
        return math.ceil(self.epoch_samples / self.global_batch)

    def seen_before(self, step: int) -> int:
        """How many samples, on all processes, the steps before this one hold."""
        if self.samples.streaming:
            return step * self.global_batch
        epoch, within = divmod(step, self.epoch_steps)
        return epoch * self.epoch_samples + min(within * self.global_batch, self.epoch_samples)

    def __iter__(self) -> Iterator[Step]:
        info = get_worker_info()
        first, stride = (0, 1) if info is None else (info.id, info.num_workers)
        shares = self._streamed if self.samples.streaming else self._shares
        for step, epoch, seen, raw, state in shares(self.start_step + first, stride):
            made = Step(step, epoch, seen=seen, state=state)
            for start in range(0, len(raw), self.batch_size):
                part = raw[start : start + self.batch_size]
                bad: list[dict[str, Any]] = []
                batch = self.collate(part, bad)
                made.skipped += [{**record, "step": step} for record in bad]
                made.samples += len(part) - len(bad)
                left_out = {(record["source"], record["sample"]) for record in bad}
                named = [(sample.get("source"), sample.get("name")) for sample in part]
                made.names += [f"{source}: {name}" for source, name in named if (source, name) not in left_out]
                if batch is not None:
                    made.micro_batches.append(batch)
            yield made

    def _streamed(self, first: int, stride: int) -> Iterator[_Share]:
        """Every `stride`-th step of a stream."""
        lane = first % stride
        reader = self.samples.reader(self.seed, self.shuffle, (self.rank * stride + lane, self.world * stride))
        if first >= stride:
            if lane not in self.states:
                raise ValueError(f"a stream goes on at step {first} only from the state of reader {lane} of {stride}")
            reader.go_on(self.states[lane])
        samples = iter(reader)
        for step in range(first, self.steps, stride):
            raw = list(itertools.islice(samples, self.batch_size * self.accumulation))
            for place, sample in enumerate(raw):
                sample["index"] = step * self.global_batch + place * self.world + self.rank
            yield step, float(raw[0]["epoch"]), self.global_batch, raw, reader.state()

    def _shares(self, first: int, stride: int) -> Iterator[_Share]:
        """Every `stride`-th step: its number, epoch, samples on all processes, the raw ones of this process, and of a
        stream where its reader goes on."""
        mine = slice(self.rank, None, self.world)
        order, current = np.empty(0, dtype=np.int64), -1
        for step in range(first, self.steps, stride):
            epoch, within = divmod(step, self.epoch_steps)
            if epoch != current:
                order, current = self._order(epoch), epoch
            batch = order[within * self.global_batch : (within + 1) * self.global_batch]
            raw = [{**self.samples[int(index)], "epoch": epoch} for index in batch[mine]]
            yield step, step / self.epoch_steps, len(batch), raw, None

    def _order(self, epoch: int) -> np.ndarray:
        """The indices of an epoch in the order they are seen."""
        indices = self.samples.epoch(self.seed, epoch)
        generator = np.random.default_rng((self.seed, epoch, 1))
        if self.shuffle:
            indices = generator.permutation(indices)
        if self.lengths is not None:
            # Sort pools of 50 batches by length, then shuffle the batches; the one that is not full stays last.
            pools = np.split(indices, range(50 * self.global_batch, len(indices), 50 * self.global_batch))
            lengths = self.lengths
            pools = [pool[np.argsort(lengths[pool % len(lengths)], kind="stable")] for pool in pools]
            full = len(indices) // self.global_batch * self.global_batch
            indices = np.concatenate(pools)
            batches = indices[:full].reshape(-1, self.global_batch)
            batches = generator.permutation(batches) if self.shuffle else batches
            indices = np.concatenate([batches.ravel(), indices[full:]])
        return indices
