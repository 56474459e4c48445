"""The steps of a stage's data, for this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..data.augmentation import NO_AUGMENTATION
from ..data.collators import ConversationCollator, Labelled, VisionCollator
from ..data.samples import Samples
from ..data.stream import BatchStream, Step
from ..processing_panorama import PanoramaProcessor
from .signals import ignore_signals
from .stage import Stage


class WorkerLost(RuntimeError):
    """A process that prepares data is gone."""


class Feed:
    """Training and validation data as steps, made by worker processes.

    Args:
        stage: that is trained.
        processor: of the model.
        train: samples to train on.
        validation: samples to validate on.
        compares: whether the overlap loss is part of a later stage.
        labelled: where tokens are taught what they show.
    """

    def __init__(
        self,
        stage: Stage,
        processor: PanoramaProcessor,
        train: Samples,
        validation: Samples | None,
        compares: bool,
        labelled: Labelled | None = None,
    ):
        self.stage, self.processor, self.compares, self.labelled = stage, processor, compares, labelled
        self.train, self.validation = train, validation
        self.stream = self._batches(train)

    @property
    def size(self) -> int | None:
        """Samples of an epoch without repetitions; unknown of a stream."""
        return None if self.train.streaming else len(self.train)

    @property
    def lanes(self) -> int:
        """How many workers take turns at making steps."""
        return max(1, self.stage.config.num_workers)

    def describe(self) -> list[dict[str, Any]]:
        """The sources, as the model card names them."""
        sources = self.stage.options.data or self.stage.config.data
        return [{"path": source.path, "samples": self.size, "weight": source.weight} for source in sources]

    def epoch(self, made: Step) -> float:
        """Passes over the data when a step is done; of a stream, whose length is not known, whole ones before it."""
        return (made.index + 1) / self.stream.epoch_steps if self.stream.epoch_steps else made.epoch

    def go_on(self, step: int, states: dict[int, dict[str, Any]]) -> None:
        """Begin with a step; of a stream, with where each worker was."""
        self.stream.start_step, self.stream.states = step, states

    def remember(self, made: Step) -> None:
        """Of a stream, where the worker that made this step goes on."""
        if made.state is not None:
            self.stream.states[made.index % self.lanes] = made.state

    @contextmanager
    def training(self) -> Iterator[Iterator[Step]]:
        """The steps that are left."""
        with self._prepared(self.stream) as steps:
            yield steps

    @contextmanager
    def validating(self) -> Iterator[Iterator[Step]]:
        """One micro-batch a step: all of the validation samples, or of a stream as many as the run says."""
        assert self.validation is not None
        with self._prepared(self._batches(self.validation, training=False)) as steps:
            yield steps

    def _batches(self, samples: Samples, training: bool = True) -> BatchStream:
        config, options = self.stage.config, self.stage.options
        augmentation = options.augmentation if training else NO_AUGMENTATION
        collate: Any
        if self.stage.name == "vision":
            heading = training and config.random_heading
            collate = VisionCollator(
                self.processor, config.seed, config.cache_dir, heading, self.labelled, augmentation
            )
        else:
            collate = ConversationCollator(
                self.processor,
                config.cache_dir,
                self.compares,
                self.labelled,
                independent=options.independent_questions,
                seed=config.seed,
                further_view=options.further_view if training else 0.0,
                augmentation=augmentation,
            )
        return BatchStream(
            samples,
            collate,
            batch_size=options.batch_size,
            accumulation=options.accumulation if training else 1,
            rank=self.stage.accelerator.process_index,
            world=self.stage.accelerator.num_processes,
            seed=config.seed,
            epochs=options.epochs if training else 1,
            max_steps=options.max_steps if training else config.eval_batches if samples.streaming else None,
            shuffle=training,
            group_by_length=training and config.group_by_length and self.stage.name != "vision",
        )

    @contextmanager
    def _prepared(self, stream: BatchStream) -> Iterator[Iterator[Step]]:
        """The steps of a stream, from workers that end with the block. Left to the garbage collector they may not hear
        that they are to end, and the run would wait for them forever, because they ignore SIGTERM.

        Raises:
            WorkerLost: where one of them is gone.
        """
        workers = self.stage.config.num_workers
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=self.stage.accelerator.device.type == "cuda",
            worker_init_fn=ignore_signals,
            generator=torch.Generator().manual_seed(self.stage.config.seed),  # else it would draw from dropout's
        )
        steps: Any = iter(loader)
        try:
            yield steps
        except (RuntimeError, OSError, EOFError) as error:  # torch raises wherever the run is when a worker ends
            lost = _signal_of_a_lost(steps._workers if workers else ())
            if lost is None:
                raise
            memory = ", as it is where memory runs out" if lost == signal.SIGKILL else ""
            raise WorkerLost(
                f"a data worker was ended by signal {lost}{memory}: fewer num_workers take less of it. Start the same "
                "command again to go on from the last checkpoint"
            ) from error
        finally:
            if workers:
                steps._shutdown_workers()


def _signal_of_a_lost(workers: Sequence[Any]) -> int | None:
    """The signal that ended one of these processes; `None` where none ended so."""
    for worker in workers:
        worker.join(1)
        if worker.exitcode is not None and worker.exitcode < 0:
            return -worker.exitcode
    return None
