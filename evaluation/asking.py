"""Asking a model: batches of questions in, greedy answers out; PanoramaVLM, or any other of transformers."""

from __future__ import annotations

import inspect
import logging
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..ask import question
from ..image_processing_panorama import READ_OPTIONS
from ..processing_panorama import PanoramaProcessor, split_steps
from ..reading_panorama import open_image, read_panorama
from ..sampling_panorama import needed_width, tilted_pixels
from .items import Item
from .turning import Variant, turned_pixels

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, EOFError, struct.error)


@dataclass(frozen=True)
class Asked:
    """A question as it is asked.

    Attributes:
        item: with the answer that is right as the panorama is shown.
        variant: how it is shown.
    """

    item: Item
    variant: Variant = Variant()

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others."""
        return self.item.id, self.variant.name


@dataclass(frozen=True)
class Said:
    """An answer with the steps before it, or why there is none."""

    answer: str = ""
    error: str | None = None
    steps: str = ""


@dataclass(frozen=True)
class _Ready:
    """A batch that can be answered.

    Attributes:
        errors: why a question cannot be asked, `None` where it can.
        inputs: of the model, for those that can; `None` where none can.
    """

    errors: list[str | None]
    inputs: Any


class Answerer:
    """Asks a model.

    Args:
        model, processor: that belong together.
        max_new_tokens: of an answer, at most.
        blind: show a black panorama of the same size instead.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, blind: bool = False):
        self.model, self.processor, self.blind = model, processor, blind
        self.max_new_tokens = max_new_tokens
        self.is_ours = isinstance(processor, PanoramaProcessor)
        if not self.is_ours:
            processor.tokenizer.padding_side = "left"
            if processor.tokenizer.pad_token is None:
                processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def __call__(self, batches: Iterable[Sequence[Asked]]) -> Iterator[list[Said]]:
        """The answers of each batch; a question whose panorama cannot be read has an error instead. A batch is made
        ready while the one before is answered."""
        with ThreadPoolExecutor(1) as worker:
            ready: deque[Future[_Ready]] = deque()
            for batch in batches:
                ready.append(worker.submit(self._make_ready, batch))
                if len(ready) > 1:
                    yield self._answer(ready.popleft().result())
            while ready:
                yield self._answer(ready.popleft().result())

    def _make_ready(self, batch: Sequence[Asked]) -> _Ready:
        try:
            return _Ready([None] * len(batch), self._inputs(batch))
        except UNREADABLE:
            errors = [self._error_of(asked) for asked in batch]
            whole = [asked for asked, error in zip(batch, errors, strict=True) if error is None]
            return _Ready(errors, self._inputs(whole) if whole else None)

    def _error_of(self, asked: Asked) -> str | None:
        try:
            self._inputs([asked])
        except UNREADABLE as error:
            logger.debug("No answer to %s: %s", asked.item.id, error)
            return _one_line(error)
        return None

    def _answer(self, ready: _Ready) -> list[Said]:
        answers = map(split_steps, [] if ready.inputs is None else self._answers(ready.inputs))
        return [Said(**next(answers)._asdict()) if error is None else Said(error=error) for error in ready.errors]

    def _inputs(self, batch: Sequence[Asked]) -> Any:
        from .prompts import ask_text

        conversations = [question(self._shown(asked), ask_text(asked.item)) for asked in batch]
        own: dict[str, Any] = {"padding": True}
        if self.is_ours and any(asked.variant.heading for asked in batch):
            own["images_kwargs"] = {"yaw_offsets": [float(asked.variant.heading) for asked in batch]}
        return self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs=own,
        )

    @torch.no_grad()
    def _answers(self, inputs: Any) -> list[str]:
        inputs = inputs.to(self.model.device)
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.is_ours:
            tokenizer = self.processor.tokenizer
            return list(
                self.model.generate(**inputs, **options, return_dict_in_generate=True, tokenizer=tokenizer).text
            )
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)
        sequences = self.model.generate(**inputs, **options, pad_token_id=self.processor.tokenizer.pad_token_id)
        new = sequences[:, inputs["input_ids"].shape[1] :]
        return [words.strip() for words in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _shown(self, asked: Asked) -> Any:
        """The panorama of a question. Ours gets the file itself where it can: it knows the part of the sphere that the
        file shows, and turns it with that; any other model gets the flat image of the whole sphere."""
        source, variant = asked.item.image, asked.variant
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            raise ValueError(f"the panorama must be a file, got the address {source[:80]!r}")
        if self.blind:
            image = open_image(source)
            with image:
                return Image.new("RGB", image.size)
        if self.is_ours and not (variant.pitch or variant.roll):
            return source
        options: dict[str, Any] = {}
        if self.is_ours:
            own = self.processor.image_processor
            options = {name: getattr(own, name) for name in READ_OPTIONS} | {"fill": own.image_mean}
            options["needed_width"] = needed_width(own.view_plan, own.image_size)
        pixels = read_panorama(source, **options).pixels
        array = (pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)).numpy()
        if variant.pitch or variant.roll:
            array = tilted_pixels(array, variant.pitch, variant.roll)
        if variant.heading and not self.is_ours:
            array = turned_pixels(array, variant.heading)
        return Image.fromarray(array)


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:500] if words else type(error).__name__
