"""Collators: samples as inputs of the model, a bad one with its reason."""

from __future__ import annotations

import copy
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PILImage
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_utils import BatchFeature

from ..processing_panorama import IGNORE_INDEX, PanoramaProcessor
from .fetching import fetch
from .rows import BadSample, RawSample, conversation

_BAD_INPUT = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError),
    *(OSError, EOFError, SyntaxError, zlib.error, struct.error),
    *(PILImage.DecompressionBombError, TemplateError),
)  # what a broken image or a conversation that the chat template refuses raises


class _Collator:
    """Prepare samples one by one, so that a bad one does not spoil its batch, and pad the good ones on the right.

    `collate(samples, skipped)` gives a batch, `None` where no sample is good, and appends to `skipped` a record
    `{"sample", "source", "reason"}` for each bad one; without the list a bad sample is a :class:`BadSample`.
    """

    def __init__(self, processor: PanoramaProcessor, cache_dir: str | os.PathLike[str] | None = None):
        self.processor = copy.copy(processor)
        if cache_dir is not None:
            self.processor.image_processor = copy.copy(processor.image_processor)
            self.processor.image_processor.cache_dir = cache_dir
        self.warned: set[tuple[str, int]] = set()
        self.neighbours = processor.image_processor.view_plan.neighbours()

    def check_comparable(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Raise :class:`BadSample` where no two neighbouring views show what the camera saw."""
        masks = inputs.get("view_mask", ())
        if len(masks) and not any(mask[first] and mask[second] for mask in masks for first, second in self.neighbours):
            raise BadSample("nothing to compare: no two neighbouring views show what the camera saw")

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        """The inputs of one sample, with a leading dimension of 1 (or its number of panoramas)."""
        raise NotImplementedError

    def __call__(self, samples: list[RawSample], skipped: list[dict[str, Any]] | None = None) -> BatchFeature | None:
        good = []
        for sample in samples:
            try:
                if "error" in sample:
                    raise BadSample(sample["error"])
                with self._each_warning_once():
                    good.append(self.prepare(sample))
            except _BAD_INPUT as error:
                reason = str(error)
                if not isinstance(error, BadSample) and not reason.startswith("too long: "):
                    of_image = not isinstance(error, ValueError | TypeError | TemplateError) or "cannot read" in reason
                    files = ", ".join(image if isinstance(image, str) else "in bytes" for image in _images(sample))
                    reason = f"{'unreadable image' if of_image else 'unusable sample'}: {files}: {reason}"
                if skipped is None:
                    raise BadSample(reason) from error
                skipped.append({"sample": sample.get("name"), "source": sample.get("source"), "reason": reason})
        if not good:
            return None
        batch = {"pixel_values": torch.cat([each["pixel_values"] for each in good])}  # [panoramas, V, 3, H, W]
        if any("view_mask" in each for each in good):
            masks = [
                each.get("view_mask", torch.ones(each["pixel_values"].shape[:2], dtype=torch.bool)) for each in good
            ]
            batch["view_mask"] = torch.cat(masks)  # [panoramas, V]
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        for name, value in padding.items():
            if name in good[0]:
                rows = [each[name][0] for each in good]
                batch[name] = pad_sequence(rows, batch_first=True, padding_value=value)  # [B, T]
        return BatchFeature(batch)

    @contextmanager
    def _each_warning_once(self) -> Iterator[None]:
        """Let a warning through the first time that its line gives one: images differ, and so do the messages."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            place = (warning.filename, warning.lineno)
            if place not in self.warned:
                self.warned.add(place)
                warnings.warn_explicit(warning.message, warning.category, *place)


class VisionCollator(_Collator):
    """Batches of stage `vision`: `pixel_values` (and `view_mask`) of panoramas, each turned to a random heading that
    follows from the seed, the epoch and the sample.

    Args:
        processor: of the model.
        seed: of the headings.
        cache_dir: folder for prepared views; headings are multiples of 45 degrees then (else of 1).
        random_heading: turn the panoramas.
    """

    def __init__(
        self,
        processor: PanoramaProcessor,
        seed: int,
        cache_dir: str | os.PathLike[str] | None = None,
        random_heading: bool = True,
    ):
        super().__init__(processor, cache_dir)
        self.seed, self.random_heading = seed, random_heading
        self.step_deg = 1 if cache_dir is None else 45

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        options = {}
        if self.random_heading:
            generator = np.random.default_rng((self.seed, sample.get("epoch", 0), sample.get("index", 0)))
            options["yaw_offsets"] = [float(self.step_deg * generator.integers(360 // self.step_deg))]
        image = _present(sample["image"], sample)
        inputs = self.processor.image_processor(images=[image], return_tensors="pt", **options)
        self.check_comparable(inputs)
        return inputs


class ConversationCollator(_Collator):
    """Batches of the later stages: `input_ids`, `attention_mask`, `labels`, `pixel_values` (and `view_mask`) of
    conversations about panoramas.

    Args:
        processor: of the model. Samples of more than its `max_text_length` text tokens are skipped.
        cache_dir: folder for prepared views.
        compares: whether the overlap loss is part of the stage: samples without anything to compare are skipped.
    """

    def __init__(
        self,
        processor: PanoramaProcessor,
        cache_dir: str | os.PathLike[str] | None = None,
        compares: bool = False,
    ):
        super().__init__(processor, cache_dir)
        self.compares = compares

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        messages: list[dict[str, Any]] = []
        for message in sample["messages"] if "messages" in sample else conversation(**sample):
            parts = [
                {**part, "image": _present(part["image"], sample)} if part["type"] == "image" else part
                for part in message["content"]
            ]
            if message["role"] != "system" and not any((part.get("text") or "").strip() for part in parts):
                kind = "question" if message["role"] == "user" else "answer"
                raise BadSample(f"empty {kind}: in turn {len(messages) + 1}")
            messages.append({**message, "content": parts})
        if not any(message["role"] == "assistant" for message in messages):
            raise BadSample("no answer: there is no turn of the assistant to learn from")
        inputs = self.processor.apply_chat_template([messages], return_labels=True)
        if self.compares:
            self.check_comparable(inputs)
        return inputs


def _images(sample: RawSample) -> list[Any]:
    parts = [part for message in sample.get("messages", []) for part in message["content"]]
    return [sample["image"]] if "image" in sample else [part["image"] for part in parts if part["type"] == "image"]


def _present(image: Any, sample: RawSample) -> Any:
    """The image, if it is there. Rows come from outside: of what has a protocol, a file of the Hub dataset that is
    streamed is fetched, and what http and https name only where the source says so."""
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        if "fetch" not in sample:
            raise BadSample(
                f"missing image: {image} is a URL; download it and name its folder with `images`, or give the source "
                "`fetch: true`"
            )
        return fetch(image, sample["fetch"])
    if "://" in image:
        own = re.match(rf"hf://datasets/{re.escape(sample.get('source') or '')}[@/]", image)
        if own is None or "::" in image:
            raise BadSample(f"missing image: {image} has a protocol that is not read; download it")
        with fsspec.open(image, "rb") as file:
            return file.read()
    if not os.path.isfile(image):
        raise BadSample(f"missing image: {image} does not exist")
    return image
