"""The processor: text and panoramas in, model inputs (and labels for training) out."""

import copy
import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import (
    _MARKED_RE,
    _UNMARKED,
    AudioKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    VideosKwargs,
)
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

from .configuration_panorama import IMAGE_TOKEN, PanoramaConfig
from .conversations_panorama import (
    STEPS,
    Frame,
    Message,
    TemplateError,
    as_text,
    encode,
    images_of,
    is_marked,
    normalized,
    shown_by,
    turns_of_the_assistant,
    words_of,
)
from .geometry_panorama import View, check_view_text, view_words
from .image_processing_panorama import PanoramaImageProcessor, PanoramaImageProcessorKwargs, flatten_images
from .options_panorama import DEFAULT_PROMPT, IMAGE_MEAN, IMAGE_STD, MAX_TEXT_LENGTH, check_resembling_names
from .places_panorama import NamedPlace, read_places
from .placing_panorama import covered_by_size
from .sampling_panorama import view_mask
from .vlm_panorama import vlm_reading

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # what cross-entropy leaves out
_STAND_IN = Image.new("L", (1, 1))  # for a panorama that is not opened yet

# For tokenizers without a chat template of their own.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Stands before the language model's own template, which as a rule knows only text: it turns the parts of a message
# into one string with a placeholder for each panorama, and adds the system prompt where the conversation has none.
_PRELUDE = """\
{%- set panorama = namespace(messages=[]) -%}
{%- if SYSTEM_PROMPT and messages[0]['role'] != 'system' -%}
{%- set panorama.messages = [{'role': 'system', 'content': SYSTEM_PROMPT}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set panorama.messages = panorama.messages + [message] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set parts.text = parts.text + part['text'] -%}
{%- elif part['type'] == 'image' -%}{%- set parts.text = parts.text + IMAGE_TOKEN -%}
{%- else -%}{{- raise_exception('a message may hold parts of type text and image, got ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- set panorama.messages = panorama.messages + [dict(message, content=parts.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = panorama.messages -%}
"""
# Stands before the template of a vision-language model, which reads parts: it turns strings into parts.
_PARTS_PRELUDE = """\
{%- set panorama = namespace(messages=[]) -%}
{%- if SYSTEM_PROMPT and messages[0]['role'] != 'system' -%}
{%- set panorama.messages = [{'role': 'system', 'content': [{'type': 'text', 'text': SYSTEM_PROMPT}]}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set panorama.messages = panorama.messages
    + [dict(message, content=[{'type': 'text', 'text': message['content']}])] -%}
{%- else -%}
{%- for part in message['content'] if part['type'] not in ('text', 'image') -%}
{{- raise_exception('a message may hold parts of type text and image, got ' + part['type']) -}}
{%- endfor -%}
{%- set panorama.messages = panorama.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = panorama.messages -%}
"""


_DEFAULTS: dict[str, dict[str, Any]] = {"text_kwargs": {"padding": True}}  # where the tokenizer says nothing else


Shown = tuple[str, int, str]  # words before the tokens of a view, how many they are, and words behind them


def reads_parts(template: str, placeholder: str) -> bool:
    """Whether a chat template reads messages made of parts, and writes a placeholder, as it stands in it, for an
    image."""
    parts = [{"type": "image"}, {"type": "text", "text": "words"}]
    try:
        chat = [{"role": "user", "content": parts}]
        (shown,), _ = render_jinja_template([chat], chat_template=template, bos_token="", eos_token="", pad_token="")
    except (TemplateError, TypeError):
        return False
    return placeholder in template and placeholder in shown and "words" in shown and "'type'" not in shown


class SteppedAnswer(NamedTuple):
    """An answer, and the steps that were said before it."""

    answer: str
    steps: str = ""


def split_steps(text: str) -> SteppedAnswer:
    """`<think>steps</think>answer` apart; the last answer where there are several steps, none where steps never end."""
    opens, closes = STEPS
    if opens not in text and closes not in text:
        return SteppedAnswer(text.strip())
    steps, ends, answer = text.rpartition(closes)
    if not ends:
        warnings.warn("an answer ended before its steps did, and is empty: raise max_new_tokens", stacklevel=2)
    return SteppedAnswer(answer.strip() if ends else "", (steps if ends else answer).replace(opens, " ").strip())


class PanoramaProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call."""

    images_kwargs: PanoramaImageProcessorKwargs
    _defaults = _DEFAULTS


_CALL_OPTIONS = frozenset().union(
    *(kwargs.__annotations__ for kwargs in (TextKwargs, VideosKwargs, AudioKwargs, PanoramaProcessorKwargs)),
    PanoramaImageProcessorKwargs.__annotations__,
)


class PanoramaProcessor(ProcessorMixin):
    """Chat template, `<image>` placeholders, views.

    `processor(images=..., text=..., return_tensors="pt")` and `processor.apply_chat_template(messages,
    tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")` pad on the left, for
    generation; `apply_chat_template(conversations, return_labels=True)` pads on the right and adds `labels`.

    Args:
        image_processor: makes the views.
        tokenizer: of the language model. `<image>` is added to it where it lacks one, and an end-of-sequence token
            serves for padding where it has no padding token.
        chat_template: Jinja, or a dict of named ones; without it the tokenizer's own, taught to read panoramas (see
            :meth:`teach_template`).
        num_image_tokens: placeholders a panorama expands to; `PanoramaConfig.num_image_tokens`.
        image_tokens_per_view: how many of them belong to each view; `PanoramaConfig.image_tokens_per_view`. A partial
            panorama expands to those of the views that show something.
        max_text_length, default_generation_prompt, vision_token_fallback_position: as in :class:`PanoramaConfig`.
        image_token: the placeholder in texts.
        tokens_per_view: placeholders that a further view of a panorama costs; `PanoramaConfig.tokens_per_view`.
        view_text, view_prefix, view_suffix: what is said before and behind the tokens of each view, as in
            :class:`PanoramaConfig`.
    """

    valid_processor_kwargs = PanoramaProcessorKwargs

    def __init__(
        self,
        image_processor: PanoramaImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        num_image_tokens: int = 1024,
        image_tokens_per_view: Sequence[int] | None = None,
        max_text_length: int = MAX_TEXT_LENGTH,
        default_generation_prompt: str = DEFAULT_PROMPT,
        vision_token_fallback_position: str = "start",
        image_token: str = IMAGE_TOKEN,
        tokens_per_view: int | None = None,
        view_text: str | None = None,
        view_prefix: str = "",
        view_suffix: str = "",
    ):
        if tokenizer is None or image_processor is None:
            raise ValueError("PanoramaProcessor needs an image_processor and a tokenizer, one of them is None")
        if tokenizer.convert_tokens_to_ids(image_token) in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
            logger.info("The tokenizer has no padding token; %r serves for it.", tokenizer.eos_token)
        tokenizer.padding_side = "left"
        if image_tokens_per_view is not None and sum(image_tokens_per_view) != num_image_tokens:
            raise ValueError(
                f"image_tokens_per_view={list(image_tokens_per_view)} does not add up to {num_image_tokens=}"
            )
        self.num_image_tokens = num_image_tokens
        self.image_tokens_per_view = None if image_tokens_per_view is None else list(image_tokens_per_view)
        self.tokens_per_view = tokens_per_view
        self.view_text = check_view_text(view_text)
        self.view_prefix, self.view_suffix = view_prefix or "", view_suffix or ""
        if self.has_view_words and image_tokens_per_view is None:
            raise ValueError(
                "view_text, view_prefix and view_suffix stand between the views and need image_tokens_per_view; make "
                "the processor with PanoramaProcessor.from_config, or set it to PanoramaConfig.image_tokens_per_view"
            )
        self.max_text_length = max_text_length
        self.default_generation_prompt = default_generation_prompt
        self.vision_token_fallback_position = vision_token_fallback_position
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if chat_template is None:
            chat_template = self.teach_template(tokenizer.chat_template, image_token=image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._frames: dict[str, dict[Any, Frame | None]] = {}  # of each template
        self.auto_map = {"AutoProcessor": "processing_panorama.PanoramaProcessor"}  # as saved

    @property
    def has_view_words(self) -> bool:
        """Whether words stand before or behind the tokens of each view."""
        return bool(self.view_text or self.view_prefix or self.view_suffix)

    @property
    def num_tokens_with_words(self) -> int:
        """What a whole panorama costs: `num_image_tokens`, and the tokens of what is said around its views."""
        if not self.has_view_words:
            return self.num_image_tokens
        (views,) = self._shown({"pixel_values": [None]})
        (ids,) = encode(self.tokenizer, ["".join(a + self.image_token + b for a, _, b in views)])
        return self.num_image_tokens + sum(token != self.image_token_id for token in ids)

    @classmethod
    def teach_template(
        cls,
        template: Any,
        system_prompt: str | None = None,
        image_token: str = IMAGE_TOKEN,
        placeholder: str | None = None,
    ) -> str | dict[str, str]:
        """A chat template that also reads messages made of parts (`[{"type": "image"}, {"type": "text", ...}]`).

        Args:
            template: the language model's own; `None` for a plain one; a dict of named ones for as many.
            system_prompt: said first where a conversation has no system message.
            image_token: the placeholder of a panorama.
            placeholder: what the template itself writes for an image, where it reads such messages already, as those of
                vision-language models do.
        """
        options = (system_prompt, image_token, placeholder)
        if isinstance(template, Mapping):
            return {name: str(cls.teach_template(each, *options)) for name, each in template.items()}
        names = (
            f"{{%- set SYSTEM_PROMPT = {json.dumps(system_prompt or '')} -%}}\n"
            f"{{%- set IMAGE_TOKEN = {json.dumps(image_token)} -%}}\n"
        )
        if template and placeholder is not None and reads_parts(template, placeholder):
            return names + _PARTS_PRELUDE + template.replace(placeholder, image_token)
        return names + _PRELUDE + (template or _PLAIN_TEMPLATE)

    @classmethod
    def from_config(
        cls,
        config: PanoramaConfig,
        tokenizer: PreTrainedTokenizerBase,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        chat_template: Any = None,
        image_token: str = IMAGE_TOKEN,
        placeholder: str | None = None,
    ) -> "PanoramaProcessor":
        """The processor that fits a model's configuration.

        Args:
            config: of the model.
            tokenizer: of its language model.
            image_mean, image_std: what its tower expects.
            chat_template: instead of the tokenizer's; it is taught to read panoramas.
            image_token, placeholder: as in :meth:`teach_template`.
        """
        template = tokenizer.chat_template if chat_template is None else chat_template
        image_processor = PanoramaImageProcessor(
            **asdict(config.view_options),
            image_mean=image_mean,
            image_std=image_std,
        )
        return cls(
            image_processor,
            tokenizer,
            chat_template=cls.teach_template(template, config.system_prompt, image_token, placeholder),
            num_image_tokens=config.num_image_tokens,
            image_tokens_per_view=config.image_tokens_per_view,
            tokens_per_view=config.tokens_per_view,
            max_text_length=config.max_text_length,
            default_generation_prompt=config.default_generation_prompt,
            vision_token_fallback_position=config.vision_token_fallback_position,
            image_token=image_token,
            view_text=config.view_text,
            view_prefix=config.view_prefix,
            view_suffix=config.view_suffix,
        )

    @classmethod
    def from_vlm_pretrained(
        cls,
        vlm: Any,
        processor: Any = None,
        vlm_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> "PanoramaProcessor":
        """The processor for a model made from a pretrained vision-language model: its tokenizer (a copy), chat
        template, image token and image statistics.

        Args:
            vlm, processor, vlm_kwargs, options: as in :meth:`PanoramaVLM.from_vlm_pretrained`.
        """
        source, config, placeholder = vlm_reading(vlm, processor, vlm_kwargs, options)
        reader = source.image_processor
        normalized = getattr(reader, "do_normalize", True) is not False
        return cls.from_config(
            config,
            copy.deepcopy(source.tokenizer),
            reader.image_mean if normalized else [0.0, 0.0, 0.0],
            reader.image_std if normalized else [1.0, 1.0, 1.0],
            source.chat_template,
            source.tokenizer.convert_ids_to_tokens(config.image_token_id),
            placeholder,
        )

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        language: str,
        vision_kwargs: dict[str, Any] | None = None,
        language_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> "PanoramaProcessor":
        """The processor for a model composed of two pretrained ones.

        Args:
            vision, language: Hub ids or folders.
            vision_kwargs, language_kwargs: for their `from_pretrained`, such as `{"gguf_file": ...}`.
            options: options of :class:`PanoramaConfig`.
        """
        vision_kwargs, language_kwargs = vision_kwargs or {}, language_kwargs or {}
        tokenizer = AutoTokenizer.from_pretrained(language, **language_kwargs)
        config = PanoramaConfig(
            vision_config=AutoConfig.from_pretrained(vision, **vision_kwargs),
            text_config=AutoConfig.from_pretrained(language, **language_kwargs),
            **options,
        )
        return cls.from_config(config, tokenizer, *cls.image_statistics(vision, vision_kwargs))

    @staticmethod
    def image_statistics(
        vision: str, vision_kwargs: dict[str, Any] | None = None
    ) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation that a pretrained vision tower expects, from its own image processor."""
        try:
            tower = AutoImageProcessor.from_pretrained(vision, **(vision_kwargs or {}))
        except (OSError, ValueError):
            warnings.warn(
                f"{vision!r} has no image processor to take image_mean and image_std from; SigLIP's 0.5 is used",
                stacklevel=3,
            )
            return IMAGE_MEAN, IMAGE_STD
        return tower.image_mean, tower.image_std

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Make model inputs.

        Args:
            images: panoramas (see :meth:`PanoramaImageProcessor.preprocess`); one, a list, or a list of lists with
                the panoramas of each text.
            text: a prompt or a list of prompts. `<image>` marks where a panorama goes and is expanded to
                `num_image_tokens` placeholders. A prompt without one gets it at `vision_token_fallback_position`,
                an empty one asks `default_generation_prompt`; both with a warning.
            kwargs: for the tokenizer and the image processor, and `return_tensors`. Texts are padded to the longest.

        Returns:
            `input_ids` and `attention_mask` [B, T] (with text) and `pixel_values` [panoramas, V, 3, H, W] (with
            images).

        Raises:
            ValueError: where the number of `<image>` and of panoramas differ, both are named; for a misspelled option
                of the image processor.
        """
        others = [name for name in kwargs if name not in _CALL_OPTIONS]
        check_resembling_names(others, PanoramaImageProcessor.option_names(), type(self).__name__)
        if isinstance(images, list | tuple) and not flatten_images(images):
            images = None
        for name in ("videos", "audio", "audios"):  # lmms-eval hands over empty lists, whatever the model takes
            other = kwargs.pop(name, None)
            if other is not None and not (isinstance(other, list | tuple) and not other):
                raise ValueError(f"{type(self).__name__} takes images and text, got {name}")
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            text = self._place_images(text, images, bool(kwargs.get("sanitize_control_tokens")))
            if (bos := self.tokenizer.bos_token) and all(prompt.startswith(bos) for prompt in text):
                kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    def _place_images(self, text: list[str], images: Any, marked: bool) -> list[str]:
        """Prompts with the `<image>` and the words that they need; counts are checked a prompt where they are known.

        `marked`: whether an `<image>` that is marked as text is none.
        """

        def placeholders(prompt: str) -> int:
            return (_MARKED_RE.sub("", prompt) if marked else prompt).count(self.image_token)

        if images is None:
            if stray := sum(map(placeholders, text)):
                raise ValueError(f"the texts have {stray} {self.image_token}, but there are 0 panoramas")
            return text
        nested = isinstance(images, list | tuple) and len(images) > 0 and isinstance(images[0], list | tuple)
        total = len(flatten_images(images))
        if nested:
            counts = [len(of_one) for of_one in images]
        elif total == len(text):
            counts = [1] * total
        else:
            counts = [total] if len(text) == 1 else []
        if counts and len(counts) != len(text):
            raise ValueError(f"got panoramas for {len(counts)} texts, but {len(text)} texts")
        placed = []
        for prompt, count in zip(text, counts or [0] * len(text), strict=True):
            if count and not placeholders(prompt):
                warnings.warn(
                    f"no {self.image_token} in the text: inserted at the {self.vision_token_fallback_position}",
                    stacklevel=3,
                )
                start = self.vision_token_fallback_position == "start"
                prompt = self.image_token * count + prompt if start else prompt + self.image_token * count
            if not prompt.replace(self.image_token, "").strip():
                prompt = prompt.rstrip() + self._ask_default(stacklevel=4)
            placed.append(prompt)
        found = [*map(placeholders, placed)]
        if sum(found) != total or (nested and found != counts):
            wanted, got = (counts, found) if nested else (total, sum(found))
            raise ValueError(f"the texts have {got} {self.image_token}, but there are {wanted} panoramas")
        return placed

    def _ask_default(self, stacklevel: int) -> str:
        warnings.warn(
            f"the question is empty: asking the default prompt {self.default_generation_prompt!r}",
            stacklevel=stacklevel,
        )
        return self.default_generation_prompt

    def validate_inputs(self, images: Any = None, **kwargs: Any) -> None:
        """As `ProcessorMixin.validate_inputs`, which counts only opened images: panoramas are still files here, so it
        gets as many stand-ins."""
        stand_ins = None if images is None else [_STAND_IN] * len(flatten_images(images))
        super().validate_inputs(images=stand_ins, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """As `ProcessorMixin._process_images`, which counts only opened images: the views of all panoramas, and the
        placeholders of each."""
        inputs = self.image_processor(images, **kwargs)
        return inputs, ["".join(a + self.image_token * n + b for a, n, b in views) for views in self._shown(inputs)]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one panorama, with what is said around its views; transformers asks for it."""
        return "".join(a + self.image_token * n + b for a, n, b in self._shown(image_inputs)[image_idx])

    def _shown(self, image_inputs: Mapping[str, Any]) -> list[list[Shown]]:
        """What each panorama expands to: of each view that shows something the words before its tokens, their number,
        and the words behind; one entry for all where there are no words."""
        counts = self._image_token_counts(image_inputs)
        if not self.has_view_words:
            return [[("", count, "")] for count in counts]
        plan = self.image_processor.view_plan
        masks = image_inputs.get("view_mask", [[True] * plan.num_views] * len(counts))
        of_plan = [*zip(plan.views, self.image_tokens_per_view or (), strict=True)]
        further = image_inputs.get("further_views", [[]] * len(counts))
        panoramas = []
        for mask, others in zip(masks, further, strict=True):
            views = [view for view, shown in zip(of_plan, mask, strict=True) if shown]
            for yaw, pitch, fov in (map(float, other) for other in others):
                if yaw == yaw:  # NaN where there is none
                    views.append((View("perspective", yaw, pitch, fov), self.tokens_per_view or 0))
            panoramas.append([self._around(view, count) for view, count in views if count])
        return panoramas

    def _around(self, view: View, count: int) -> "Shown":
        return view_words(view, self.view_text) + self.view_prefix, count, self.view_suffix

    def _image_token_counts(self, image_inputs: Mapping[str, Any]) -> list[int]:
        """What each panorama expands to, from `pixel_values`, `view_mask` and `further_views`."""
        counts = self._plan_token_counts(image_inputs)
        if "further_views" not in image_inputs:
            return counts
        if self.tokens_per_view is None:
            raise ValueError(
                "further views need tokens_per_view to know what they cost; make the processor with "
                "PanoramaProcessor.from_config, or set it to PanoramaConfig.tokens_per_view"
            )
        further = (torch.as_tensor(views)[:, 0].isfinite().sum() for views in image_inputs["further_views"])
        return [own + self.tokens_per_view * int(more) for own, more in zip(counts, further, strict=True)]

    def _plan_token_counts(self, image_inputs: Mapping[str, Any]) -> list[int]:
        if "view_mask" not in image_inputs:
            return [self.num_image_tokens] * len(image_inputs["pixel_values"])
        if self.image_tokens_per_view is None:
            raise ValueError(
                "a partial panorama needs image_tokens_per_view to know what its views cost; make the processor with "
                "PanoramaProcessor.from_config, or set it to PanoramaConfig.image_tokens_per_view"
            )
        return [
            sum(count for count, shown in zip(self.image_tokens_per_view, views, strict=True) if shown)
            for views in image_inputs["view_mask"]
        ]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """What panoramas cost that nothing is known of but their sizes; serving engines ask for it.

        Args:
            image_sizes: (height, width) of each, in pixels. One that is not 2:1 is partial, as it is for
                :func:`reading_panorama.read_panorama`; what Photo Sphere data say is not known here.
            kwargs: options of the call. Those of single panoramas are refused: what they cost does not follow.

        Returns:
            `num_image_tokens`, the placeholders of each, and `num_image_patches`, its rows of `pixel_values`: 1.
        """
        if refused := sorted({"further_views", "yaw_offsets", "mirrored", "tilts"} & kwargs.keys()):
            raise ValueError(f"what a panorama costs with {', '.join(refused)} does not follow from its size")
        if image_sizes is None:
            return MultiModalData()
        plan = self.image_processor.view_plan
        least = kwargs.get("min_seen", self.image_processor.min_seen)
        masks = [view_mask(plan, covered_by_size(*size), min_seen=least) for size in image_sizes]
        counts = [
            self.num_image_tokens if mask.all() else self._plan_token_counts({"view_mask": [mask]})[0] for mask in masks
        ]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def post_process_grounding(self, answers: Any) -> list[list[NamedPlace]]:
        """The places on the sphere that answers name, with what they are called there.

        Args:
            answers: texts, or ids of generated tokens [B, T] (one text or row of ids counts as a batch of one).

        Returns:
            For each answer its `(label, BFoV(yaw, pitch, x_fov, y_fov))` in degrees, in its order; none where it names
            none. See :func:`places_panorama.read_places` for the ways of writing that are understood.
        """
        return [read_places(split_steps(text).answer) for text in self._texts_of(answers)]

    def post_process_answer(self, answers: Any) -> list[SteppedAnswer]:
        """Answers apart from the steps that were said before them, as `<think>steps</think>answer`.

        Args:
            answers: texts, or ids of generated tokens [B, T] (one text or row of ids counts as a batch of one).

        Returns:
            For each its `(answer, steps)`; steps are empty where there are none, and the answer where it never came.
        """
        return [split_steps(text) for text in self._texts_of(answers)]

    def _texts_of(self, answers: Any) -> list[str]:
        if isinstance(answers, str):
            answers = [answers]
        if all(isinstance(answer, str) for answer in answers):
            return list(answers)
        ids = torch.as_tensor(answers)
        return self.batch_decode(ids[None] if ids.ndim == 1 else ids, skip_special_tokens=True)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        return_labels: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, and make model inputs of them with `tokenize=True, return_dict=True`.

        What stands in a text is text, also where somebody typed `<image>` or the end of a turn: only a part of type
        `image` is a panorama, and only the template writes control tokens. Nothing is added to what the template
        writes, such as a BOS token.

        Args:
            conversation: messages, or a list of conversations. The content of a message is a string, or a list of
                parts: `{"type": "text", "text": ...}`, `{"type": "image", "image": panorama}` (or `url`, `path`,
                `base64`; or OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`), with
                `"further_views": [(yaw, pitch, fov), ...]` where parts of it are to be looked at more closely, and
                `"yaw_offset"`, `"mirrored"` and `"tilt"` where it is to be shown otherwise (each as one entry of
                :meth:`PanoramaImageProcessor.preprocess`'s `yaw_offsets`, `mirrored` and `tilts`). Keys whose value is
                `None` are as if they were not there.
            chat_template: instead of the processor's own, or the name of one of these.
            return_labels: make training inputs: padding on the right, and `labels` [B, T] which repeat `input_ids`
                where the assistant speaks (what closes its turn included; `eos_token` where the template closes the
                last turn with nothing) and are -100 elsewhere, and at panoramas. A text longer than `max_text_length`
                is an error: cut off, it would teach answers without their ends.
            kwargs: as in `ProcessorMixin.apply_chat_template`, such as `tools`, variables of the template
                (`enable_thinking`) and `processor_kwargs`.

        Raises:
            ValueError: for messages that are none, and with `return_labels` where the words of the assistant cannot be
                found in what the template writes, and for options that contradict it.
        """
        batched = bool(conversation) and not (isinstance(conversation[0], Mapping) or hasattr(conversation[0], "role"))
        batch: list[Any] = list(conversation) if batched else [conversation]
        conversations = [self._fill_in(normalized(messages)) for messages in batch]
        template = self._resolve_chat_template(chat_template)
        if return_labels:
            return self._training_inputs(conversations, template, **kwargs)
        if kwargs.get("tokenize"):
            own = dict(kwargs.get("processor_kwargs") or {})
            if shown := shown_by(conversations):
                own["images_kwargs"] = {**own.get("images_kwargs", {}), **shown}
            own.setdefault("add_special_tokens", False)
            marked = [as_text(self.tokenizer, template, messages) for messages in conversations]
            if any(map(is_marked, marked)):
                conversations, own["sanitize_control_tokens"] = marked, True
            kwargs["processor_kwargs"] = own
        return super().apply_chat_template(
            conversations if batched else conversations[0], chat_template=template, **kwargs
        )

    def _fill_in(self, messages: list[Message]) -> list[Message]:
        """The default prompt where the last question is empty."""
        for index in range(len(messages) - 1, -1, -1):
            if messages[index]["role"] == "user":
                content = messages[index]["content"]
                if not words_of(content).strip():
                    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                    asked = {"type": "text", "text": self._ask_default(stacklevel=4)}
                    return [*messages[:index], {**messages[index], "content": [*parts, asked]}, *messages[index + 1 :]]
                break
        return messages

    def _training_inputs(
        self,
        conversations: list[list[Message]],
        template: str,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        variables = {"tools", "documents", *_get_template_variables(template)}
        variables -= {"messages", "add_generation_prompt"}
        own = {**(processor_kwargs or {}), **{name: kwargs.pop(name) for name in [*kwargs] if name not in variables}}
        _check_training_options(own)
        written = [self._written(messages, template, kwargs) for messages in conversations]
        images = own.pop("images", None) or [images_of(messages) for messages in conversations]
        found = [sum(len(self._placeholders(piece)) for piece in pieces) for pieces, _ in written]
        if sum(found) != len(flatten_images(images)):
            raise ValueError(f"the conversations show {found} panoramas, but there are {len(flatten_images(images))}")
        own["images_kwargs"] = {**own.get("images_kwargs", {}), **shown_by(conversations)}
        inputs = self(images=images, **own) if any(found) else {}
        shown = iter(self._shown(inputs) if inputs else [])
        rows, labels = [], []
        for (pieces, open_ended), panoramas in zip(written, found, strict=True):
            of_row = [next(shown) for _ in range(panoramas)]
            ids, label = self._taught(pieces, open_ended, of_row)
            self._check_length(ids, of_row, "shorten the conversation")
            counts = iter([count for views in of_row for _, count, _ in views])
            times = torch.tensor([next(counts) if token == self.image_token_id else 1 for token in ids.tolist()])
            rows.append(ids.repeat_interleave(times))
            labels.append(label.repeat_interleave(times))
        data = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }  # each [B, T]
        data |= {name: torch.stack([torch.as_tensor(value) for value in values]) for name, values in inputs.items()}
        return BatchFeature(data)

    def _check_length(self, ids: torch.Tensor, panoramas: Sequence[Sequence[Shown]], otherwise: str) -> None:
        """Raise for too many tokens that are neither of images nor what is said around views."""
        tokens = int((ids != self.image_token_id).sum())
        if tokens > self.max_text_length and self.has_view_words:
            words = [word for views in panoramas for before, _, behind in views for word in (before, behind)]
            tokens -= sum(len(encode(self.tokenizer, [word])[0]) for word in words)
        if tokens > self.max_text_length:
            raise ValueError(
                f"too long: {tokens} text tokens, at most max_text_length={self.max_text_length} are used; "
                f"raise it, or {otherwise}"
            )

    def _placeholders(self, text: str) -> list[str]:
        """The placeholders of panoramas in a text, in which those that somebody typed are marked."""
        return re.findall(_UNMARKED + re.escape(self.image_token), text)

    def _written(self, messages: list[Message], template: str, variables: Mapping[str, Any]) -> tuple[list[str], bool]:
        """What the template writes of a conversation, in pieces of which every second is said by the assistant, and
        whether its last turn is closed with nothing."""

        def render(messages: list[Message], **options: Any) -> str:
            return super(PanoramaProcessor, self).apply_chat_template(
                messages, chat_template=template, **{**variables, **options}
            )

        messages = as_text(self.tokenizer, template, messages)
        text = render(messages)
        known = None if variables else self._frames.setdefault(template, {})
        turns = turns_of_the_assistant(render, messages, text, self._closing_tokens(), known)
        places = [0, *(place for turn in turns for place in turn[:2]), len(text)]
        open_ended = bool(turns) and not turns[-1].closed and not text[turns[-1].end :].strip()
        return [text[start:end] for start, end in pairwise(places)], open_ended

    def _taught(
        self, written: Sequence[str], open_ended: bool, panoramas: Sequence[Sequence[Shown]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of what :meth:`_written` gives and their labels, [T] each; a view of a panorama, or all of them where
        nothing is said around them, is one placeholder."""
        if self.has_view_words:
            expanded = iter(["".join(a + self.image_token + b for a, _, b in views) for views in panoramas])
            placeholder = re.compile(_UNMARKED + re.escape(self.image_token))
            written = [placeholder.sub(lambda _: next(expanded), text) for text in written]
        pieces = encode(self.tokenizer, written)
        eos = self.tokenizer.eos_token_id
        if eos is not None and open_ended:
            warnings.warn(
                "the chat template closes the last turn of the assistant with no token: "
                f"{self.tokenizer.eos_token!r} is put behind it, to teach where an answer ends",
                stacklevel=4,
            )
            pieces[-2].append(eos)
        spoken = [index % 2 == 1 for index, piece in enumerate(pieces) for _ in piece]
        ids = torch.tensor([*chain(*pieces)])
        return ids, torch.where(torch.tensor(spoken) & (ids != self.image_token_id), ids, IGNORE_INDEX)

    def _before_the_panorama(self, pieces: Sequence[str]) -> str:
        return re.split(_UNMARKED + re.escape(self.image_token), "".join(pieces))[0]

    def _closing_tokens(self) -> list[str]:
        tokens = map(str, self.tokenizer.added_tokens_decoder.values())
        return [token for token in tokens if token.strip() and token != self.image_token]

    def pack_conversations(
        self, conversations: Sequence[list[dict[str, Any]]], chat_template: str | None = None
    ) -> BatchFeature:
        """Training inputs of several conversations about one panorama in one row, none of which sees another.

        What they begin with alike, up to and with the panorama, is there once; each of the others sees that and itself,
        at the positions that it would have alone. So each is taught as if it were a row of its own, at the cost of its
        own words.

        Args:
            conversations: messages, as for :meth:`apply_chat_template`; each has the same panorama in its first
                question, before the words.
            chat_template: instead of the processor's own.

        Returns:
            `input_ids`, `labels` and `position_ids` [1, T], `attention_mask` bool [1, 1, T, T] (true where a position,
            the row, sees another), `pixel_values` [1, V, 3, H, W] and where it is partial `view_mask` [1, V].

        Raises:
            ValueError: for conversations that do not begin with the same panorama, and where all together have more
                text tokens than `max_text_length`.
        """
        template = self._resolve_chat_template(chat_template)
        each = [normalized(messages) for messages in conversations]
        written = [self._written(messages, template, {}) for messages in each]
        images = images_of(each[0])
        alone = len(images) == 1 and all(len(self._placeholders("".join(pieces))) == 1 for pieces, _ in written)
        if not alone or len({self._before_the_panorama(pieces) for pieces, _ in written}) > 1:
            raise ValueError("conversations that are packed must each begin with the same panorama and have no other")
        inputs = self.image_processor(images, return_tensors="pt", **shown_by(each[:1]))
        shown = self._shown(inputs)
        taught = [self._taught(pieces, open_ended, shown) for pieces, open_ended in written]
        rows, labels = [ids for ids, _ in taught], [label for _, label in taught]
        begins = int((rows[0] == self.image_token_id).nonzero()[-1, 0])  # the place of its last view
        counts = iter([count for _, count, _ in shown[0]])
        prefix = rows[0][: begins + 1]
        times = torch.tensor([next(counts) if token == self.image_token_id else 1 for token in prefix.tolist()])
        own = [row[begins + 1 :] for row in rows]
        self._check_length(torch.cat([prefix, *own]), shown, "pack fewer conversations")
        prefix = prefix.repeat_interleave(times)
        lengths = torch.tensor([len(prefix), *map(len, own)])
        block = torch.arange(len(lengths)).repeat_interleave(lengths)  # [T], 0 is what all share
        sees = (block[:, None] == block) | (block == 0)
        positions = [torch.arange(len(prefix)), *(len(prefix) + torch.arange(len(part)) for part in own)]
        unsupervised = torch.full((len(prefix),), IGNORE_INDEX)
        return BatchFeature(
            {
                "input_ids": torch.cat([prefix, *own])[None],
                "labels": torch.cat([unsupervised, *(label[begins + 1 :] for label in labels)])[None],
                "position_ids": torch.cat(positions)[None],
                "attention_mask": sees.tril()[None, None],
                **inputs,
            }
        )


def _check_training_options(options: Mapping[str, Any]) -> None:
    """Refuse what contradicts training inputs, which are padded on the right and never cut."""
    harmless: dict[str, tuple[Any, ...]] = {
        "tokenize": (True, False),
        "return_dict": (True, False),
        "return_tensors": ("pt", "auto", None),
        "padding": (True, "longest"),
    }
    for name in ("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "truncation"):
        harmless[name] = (False, None)
    of_texts = [name for name in options if name in TextKwargs.__annotations__ or name in harmless]
    for name in of_texts:
        if options[name] not in harmless.get(name, ()):
            raise ValueError(f"with return_labels=True there is no {name}={options[name]!r}: leave it out")


PanoramaProcessor.register_for_auto_class("AutoProcessor")
