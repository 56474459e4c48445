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
from itertools import chain
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PILImage
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_utils import BatchFeature

from ..geometry_panorama import Grid
from ..image_processing_panorama import AS_IT_IS, Shown, join_views
from ..places_panorama import read_places
from ..processing_panorama import IGNORE_INDEX, PanoramaProcessor
from ..token_labels_panorama import LabelMaps, token_labels
from .augmentation import NO_AUGMENTATION, Augmentation, augmented, heading_step, limited
from .fetching import fetch
from .label_maps import read_label_maps
from .rows import BadSample, RawSample, check_said, conversation

BAD_INPUT = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError),
    *(OSError, EOFError, SyntaxError, zlib.error, struct.error),
    *(PILImage.DecompressionBombError, TemplateError),
)  # what a broken image or a conversation that the chat template refuses raises


class Labelled(NamedTuple):
    """How tokens are taught what they show.

    Args:
        grid: (rows, columns) of the tokens of a view.
        fields: of classes, in the order of the model's `label_head`.
    """

    grid: Grid
    fields: tuple[str, ...]


class _Collator:
    """Prepare samples one by one, so that a bad one does not spoil its batch, and pad the good ones on the right.

    `collate(samples, skipped)` gives a batch, `None` where no sample is good, and appends to `skipped` a record
    `{"sample", "source", "reason"}` for each bad one; without the list a bad sample is a :class:`BadSample`.
    """

    def __init__(
        self,
        processor: PanoramaProcessor,
        cache_dir: str | os.PathLike[str] | None = None,
        labelled: Labelled | None = None,
    ):
        self.labelled = labelled
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

    def add_labels(self, inputs: dict[str, Any], sample: RawSample, shown: Shown = AS_IT_IS) -> None:
        """Put in what the tokens show, where that is taught; unknown where the sample does not say it, and where it is
        tilted: extents of places are those of a level camera."""
        if self.labelled is None:
            return
        maps = sample.get("labels")
        yaw_offset = shown.yaw_offset
        if any(shown.tilt):
            maps = None
        elif "label_files" in sample:
            own = self.processor.image_processor
            how = {"align_heading": own.align_heading, "level": own.level}
            how["projection"] = sample.get("projection", own.projection)
            maps = read_label_maps(images_of(sample)[0], **sample["label_files"], **how)
        panoramas = len(inputs["pixel_values"])
        if maps is not None and panoramas != 1:
            raise BadSample(f"token labels: they are of one panorama, and the sample has {panoramas}")
        if maps is not None and shown.mirrored:  # first mirrored and then turned the other way is the same
            maps, yaw_offset = maps.mirrored(), -yaw_offset
        plan = self.processor.image_processor.view_plan
        classes, places = token_labels(
            plan, self.labelled.grid, LabelMaps({}) if maps is None else maps, self.labelled.fields, yaw_offset
        )
        inputs["token_classes"] = classes.expand(panoramas, -1, -1, -1)
        inputs["token_places"] = places.expand(panoramas, -1, -1, -1)

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
            except BAD_INPUT as error:
                reason = str(error)
                if not isinstance(error, BadSample) and not reason.startswith("too long: "):
                    of_image = not isinstance(error, ValueError | TypeError | TemplateError) or "cannot read" in reason
                    files = ", ".join(image if isinstance(image, str) else "in bytes" for image in images_of(sample))
                    reason = f"{'unreadable image' if of_image else 'unusable sample'}: {files}: {reason}"
                if skipped is None:
                    raise BadSample(reason) from error
                skipped.append({"sample": sample.get("name"), "source": sample.get("source"), "reason": reason})
        if not good:
            return None
        batch = join_views(good)
        for name in ("token_classes", "token_places"):
            if name in good[0]:
                batch[name] = torch.cat([each[name] for each in good])  # [panoramas, V, S, ...]
        if any(each["attention_mask"].ndim == 4 for each in good if "attention_mask" in each):
            batch |= _seen_by_each(good)
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        for name, value in padding.items():
            if name in good[0] and name not in batch:
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
        labelled: where tokens are taught what they show.
        augmentation: which are mirrored and tilted.
    """

    def __init__(
        self,
        processor: PanoramaProcessor,
        seed: int,
        cache_dir: str | os.PathLike[str] | None = None,
        random_heading: bool = True,
        labelled: Labelled | None = None,
        augmentation: Augmentation = NO_AUGMENTATION,
    ):
        super().__init__(processor, cache_dir, labelled)
        self.seed, self.random_heading, self.augmentation = seed, random_heading, augmentation
        self.step_deg = 1 if cache_dir is None else 45

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        place = (self.seed, sample.get("epoch", 0), sample.get("index", 0))
        shown = self.augmentation.draw(*place, self.step_deg) if self.augmentation else AS_IT_IS
        if self.random_heading:
            generator = np.random.default_rng(place)
            shown = shown._replace(yaw_offset=float(self.step_deg * generator.integers(360 // self.step_deg)))
        options = {"yaw_offsets": [shown.yaw_offset], "mirrored": [shown.mirrored], "tilts": [shown.tilt]}
        image = _present(sample["image"], sample)
        inputs = self.processor.image_processor(images=[image], return_tensors="pt", **options)
        self.check_comparable(inputs)
        self.add_labels(inputs, sample, shown)
        return inputs


class ConversationCollator(_Collator):
    """Batches of the later stages: `input_ids`, `attention_mask`, `labels`, `pixel_values` (and `view_mask`) of
    conversations about panoramas. Of several answers that are right, one is drawn from the seed, the epoch and the
    sample.

    Args:
        processor: of the model. Samples of more than its `max_text_length` text tokens are skipped.
        cache_dir: folder for prepared views.
        compares: whether the overlap loss is part of the stage: samples without anything to compare are skipped.
        labelled: where tokens are taught what they show.
        independent: share of the samples, in [0, 1], of which each question with its answer (and each of the further
            conversations that a sample may have about its panorama) sees the panorama and itself alone; the others are
            one conversation. Which ones follows from the seed, the epoch and the sample.
        seed: of that.
        further_view: share of the samples, in [0, 1], that see one further, narrower view in some direction.
        augmentation: which are turned, mirrored and tilted, where they know what that does to their questions; the
            further conversations are left out then. As they are where no question is left, or there is not one
            panorama in the first question.
    """

    def __init__(
        self,
        processor: PanoramaProcessor,
        cache_dir: str | os.PathLike[str] | None = None,
        compares: bool = False,
        labelled: Labelled | None = None,
        independent: float = 0.0,
        seed: int = 0,
        further_view: float = 0.0,
        augmentation: Augmentation = NO_AUGMENTATION,
    ):
        super().__init__(processor, cache_dir, labelled)
        self.compares, self.independent, self.seed = compares, independent, seed
        self.further_view, self.augmentation = further_view, augmentation
        self.step_deg = 1 if cache_dir is None else 45

    def prepare(self, sample: RawSample) -> dict[str, torch.Tensor]:
        messages = sample["messages"] if "messages" in sample else conversation(**sample)
        messages = self._checked(self._one_answer(messages, sample), sample)
        further = [self._checked(each, sample) for each in sample.get("further", [])]
        shown = AS_IT_IS
        if (found := self._augmented(messages, sample)) is not None:
            messages, shown, further = *found, []
        self._look_closer(messages, sample)
        inputs = self._packed(messages, further, sample)
        if inputs is None:
            inputs = self.processor.apply_chat_template([[*messages, *chain(*further)]], return_labels=True)
        if self.compares:
            self.check_comparable(inputs)
        self.add_labels(inputs, sample, shown)
        return inputs

    def _one_answer(self, messages: list[dict[str, Any]], sample: RawSample) -> list[dict[str, Any]]:
        """The conversation with one of the answers that are right, where there are several."""
        answers = sample.get("answers") or messages[-1:]
        generator = np.random.default_rng((self.seed, sample.get("epoch", 0), sample.get("index", 0), 4))
        return [*messages[:-1], answers[generator.integers(len(answers))]] if len(answers) > 1 else messages

    def _augmented(
        self, messages: list[dict[str, Any]], sample: RawSample
    ) -> tuple[list[dict[str, Any]], Shown] | None:
        """The sample as it is shown otherwise, and how; `None` where it is not its turn, or not known what is right."""
        known = sample.get("known")
        if not self.augmentation or known is None:
            return None
        step = max(self.step_deg, heading_step(known))
        shown = self.augmentation.draw(self.seed, sample.get("epoch", 0), sample.get("index", 0), step)
        shown = limited(shown, known)
        changed = None if shown == AS_IT_IS else augmented(messages, known, shown)
        return None if changed is None else (changed, shown)

    def _look_closer(self, messages: list[dict[str, Any]], sample: RawSample) -> None:
        """Give some samples a further view of their panorama, 30 to 60 degrees wide: half of those that name places one
        of a place that they name, within the middle half of the view, the others one uniform over the sphere."""
        image = next((part for message in messages for part in message["content"] if part["type"] == "image"), None)
        if self.further_view == 0 or image is None:
            return
        generator = np.random.default_rng((self.seed, sample.get("epoch", 0), sample.get("index", 0), 3))
        share, yaw, height, fov, aim = generator.uniform((0, -180, -1, 30, 0), (1, 180, 1, 60, 1))
        if share >= self.further_view:
            return
        pitch = np.degrees(np.arcsin(height))
        said = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if aim < 0.5 and (named := [each.place for text in said for each in read_places(text)]):
            place = named[generator.integers(len(named))]
            yaw, pitch = generator.uniform(-fov / 4, fov / 4, 2) + (place.yaw, place.pitch)
        image["further_views"] = [(float(yaw), float(np.clip(pitch, -90, 90)), float(fov))]

    def _packed(
        self, messages: list[dict[str, Any]], further: list[list[dict[str, Any]]], sample: RawSample
    ) -> BatchFeature | None:
        """The sample as questions that do not see each other, where it is its turn and there is one panorama, before
        the first question."""
        if self.independent == 0:
            return None
        generator = np.random.default_rng((self.seed, sample.get("epoch", 0), sample.get("index", 0), 2))
        if generator.random() >= self.independent:
            return None
        start = next(place for place, message in enumerate(messages) if message["role"] == "user")
        first = messages[start]["content"]
        if first[0]["type"] != "image" or len(images_of({"messages": messages})) != 1:
            warnings.warn(
                "independent_questions: a sample whose questions are not about one panorama, which stands before the "
                f"first of them, is taught as one conversation, such as {sample.get('name')}",
                stacklevel=2,
            )
            return None
        before, image, words = messages[:start], first[0], first[1:]
        turns = [{**messages[start], "content": words}, *messages[start + 1 :]]
        starts = [place for place, message in enumerate(turns) if message["role"] == "user"]
        blocks = [turns[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)] + further
        blocks = [block for block in blocks if any(message["role"] == "assistant" for message in block)]
        shown = [[*before, {**b[0], "content": [image, *b[0]["content"]]}, *b[1:]] for b in blocks]
        return self.processor.pack_conversations(shown)

    @staticmethod
    def _checked(turns: list[dict[str, Any]], sample: RawSample) -> list[dict[str, Any]]:
        """Messages with their images present, each of which says something."""
        check_said(turns)
        return [
            {
                **message,
                "content": [
                    {**part, "image": _present(part["image"], sample)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in turns
        ]


def _seen_by_each(good: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`attention_mask` bool [B, 1, T, T] and `position_ids` [B, T] of samples of which some are packed. Padding sees
    itself: attention to nothing would not be a number."""
    length = max(each["input_ids"].shape[1] for each in good)
    mask = torch.eye(length, dtype=torch.bool).expand(len(good), 1, -1, -1).clone()
    positions = torch.zeros(len(good), length, dtype=torch.long)
    for place, each in enumerate(good):
        own = each["attention_mask"]
        size = each["input_ids"].shape[1]
        mask[place, :, :size, :size] = own[0] if own.ndim == 4 else torch.ones(size, size, dtype=torch.bool).tril()
        positions[place, :size] = each["position_ids"][0] if "position_ids" in each else torch.arange(size)
    return {"attention_mask": mask, "position_ids": positions}


def images_of(sample: RawSample) -> list[Any]:
    """The images of a sample, in the order of its messages."""
    parts = [part for message in sample.get("messages", []) for part in message["content"]]
    return [sample["image"]] if "image" in sample else [part["image"] for part in parts if part["type"] == "image"]


def where_it_lies(image: str, sample: RawSample) -> str:
    """Where what a row names lies: `file`, `web` or `hub`. Rows come from outside: of what has a protocol, a file of
    the Hub dataset that is streamed is fetched, and what http and https name only where the source says so; anything
    else is a :class:`BadSample`."""
    if image.startswith(("http://", "https://")):
        if "fetch" not in sample:
            raise BadSample(
                f"missing image: {image} is a URL; download it and name its folder with `images`, or give the source "
                "`fetch: true`"
            )
        return "web"
    if "://" in image:
        own = re.match(rf"hf://datasets/{re.escape(sample.get('source') or '')}[@/]", image)
        if own is None or "::" in image:
            raise BadSample(f"missing image: {image} has a protocol that is not read; download it")
        return "hub"
    if not os.path.isfile(image):
        raise BadSample(f"missing image: {image} does not exist")
    return "file"


def _present(image: Any, sample: RawSample) -> Any:
    """The image, if it is there, with what its source says of all its images."""
    where = where_it_lies(image, sample) if isinstance(image, str) else None
    if where == "web":
        image = fetch(image, sample["fetch"])
    elif where == "hub":
        with fsspec.open(image, "rb") as file:
            image = file.read()
    if "projection" not in sample or not isinstance(image, str | bytes):
        return image
    return {"bytes" if isinstance(image, bytes) else "path": image, "projection": sample["projection"]}
