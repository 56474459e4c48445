"""Generation: `GenerationMixin` for prompts with panoramas."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from .outputs_panorama import GenerationOutput

TEMPERATURE_RANGE = (0.1, 1.0)


class PanoramaGenerationMixin(GenerationMixin):
    """`generate` of :class:`PanoramaVLM`."""

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        view_mask: torch.Tensor | None = None,
        further_views: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerationOutput:
        """Answer.

        Args:
            pixel_values: [panoramas, V, 3, H, W], or [panoramas, 3, H, W] where a panorama is one view.
            input_ids: [B, T]; without them (and with `tokenizer=`) each panorama is asked the default prompt, with a
                warning.
            attention_mask: [B, T].
            tokenizer: decodes the answer into `GenerationOutput.text`; also for `stop_strings`. A processor's is taken.
            view_mask, further_views: [panoramas, V] and [panoramas, E, 3], as in :meth:`forward`.
            kwargs: as in `GenerationMixin.generate`: `max_new_tokens`, `do_sample`, `streamer`,
                `return_dict_in_generate`, ... A `temperature` outside [0.1, 1.0] is clamped, with a warning.

        Returns:
            `sequences` [B, T + new], the prompt and the new tokens; with `return_dict_in_generate=True` a
            :class:`GenerationOutput`.
        """
        if isinstance(input_ids, GenerationConfig):  # where GenerationMixin.generate has it
            kwargs["generation_config"], input_ids = input_ids, None
        pixel_values, input_ids, attention_mask = sort_inputs(pixel_values, input_ids, attention_mask)
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        _check_arguments({**given, "view_mask": view_mask, "further_views": further_views}, kwargs)
        if tokenizer is not None:  # for stop strings, of whatever says them; servers hand a whole processor over
            tokenizer = kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
        if input_ids is None and "inputs" in kwargs:
            input_ids = kwargs.pop("inputs")
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            if further_views is not None:
                raise ValueError("further_views need input_ids with their placeholders: use the processor")
            input_ids, attention_mask = self._default_prompt(pixel_values, tokenizer, view_mask)

        prompt = input_ids
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            image_features = None
            if pixel_values is not None:
                image = self.get_image_features(pixel_values, view_mask, further_views, return_dict=True)
                image_features = image.pooler_output
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            # The panoramas are embedded once, here. Everything that looks at ids while generating (penalties,
            # stopping) sees a placeholder from inside the vocabulary.
            kwargs["inputs_embeds"] = self.model.embed(input_ids, image_features)
            input_ids = input_ids.masked_fill(self.model.is_placeholder(input_ids), 0)
        kwargs["logits_processor"] = self._without_placeholder(kwargs.get("logits_processor"))
        outputs = super().generate(inputs=input_ids, attention_mask=attention_mask, **kwargs)

        return self._with_prompt(outputs, prompt, tokenizer)

    def _without_placeholder(self, processors: LogitsProcessorList | None) -> LogitsProcessorList:
        """The processors, and one that keeps `<image>` from being generated where its id lies inside the vocabulary."""
        token = self.config.image_token_id
        processors = LogitsProcessorList(processors or [])
        if token is not None and token < self.config.text_config.vocab_size:
            processors.append(SuppressTokensLogitsProcessor([token], device=self.device))
        return processors

    @staticmethod
    def _with_prompt(
        outputs: Any, prompt: torch.Tensor | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> torch.Tensor | GenerationOutput:
        """What was generated behind the prompt [B, T] as it was given."""
        is_dict = not isinstance(outputs, torch.Tensor)
        sequences = outputs.sequences if is_dict else outputs
        start = 0 if prompt is None else prompt.shape[1]
        if prompt is not None:
            repeated = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
            sequences = torch.cat([repeated, sequences[:, start:]], dim=1)
        if not is_dict:
            return sequences
        known = {name: outputs.get(name) for name in GenerationOutput.__dataclass_fields__ if name in outputs}
        known["sequences"] = sequences
        known["generated_ids"] = sequences[:, start:]
        if tokenizer is not None:
            words = tokenizer.batch_decode(known["generated_ids"], skip_special_tokens=True)
            known["text"] = [answer.strip() for answer in words]
        return GenerationOutput(**known)

    def _default_prompt(
        self,
        pixel_values: torch.Tensor | None,
        tokenizer: PreTrainedTokenizerBase | None,
        view_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask` that ask each panorama the default prompt."""
        if pixel_values is None or tokenizer is None:
            raise ValueError("generate needs input_ids, or pixel_values and tokenizer= to ask the default prompt")
        words = self.config.default_generation_prompt
        warnings.warn(f"no input_ids: asking the default prompt {words!r}", stacklevel=3)
        words = tokenizer(words, add_special_tokens=False)["input_ids"]
        counts = torch.tensor(self.config.image_tokens_per_view)
        shown = torch.ones(len(pixel_values), len(counts)) if view_mask is None else view_mask.cpu()
        images = [[self.config.image_token_id] * int(counts[views.bool()].sum()) for views in shown]
        width = max(map(len, images))
        padded = [[0] * (width - len(tokens)) for tokens in images]  # on the left
        ids = torch.tensor([zeros + tokens + words for zeros, tokens in zip(padded, images, strict=True)])
        mask = torch.tensor([zeros + [1] * (len(row) - len(zeros)) for zeros, row in zip(padded, ids, strict=True)])
        return ids.to(pixel_values.device), mask.to(pixel_values.device)


def sort_inputs(
    pixel_values: Any, input_ids: Any, attention_mask: torch.Tensor | None = None
) -> tuple[Any, Any, torch.Tensor | None]:
    """What was given by place, in the order pixels, ids, mask: integers [B, T] in the place of the pixels are ids, and
    with other integers behind them those are their mask, as any language model of transformers takes them."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.is_floating_point() or pixel_values.ndim > 2:
        return pixel_values, input_ids, attention_mask
    if isinstance(input_ids, torch.Tensor) and not input_ids.is_floating_point():
        if attention_mask is not None:
            raise TypeError("got input_ids twice: in the place of pixel_values, which are floats, and by name")
        return None, pixel_values, input_ids
    return input_ids, pixel_values, attention_mask


def _check_arguments(tensors: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `generate` that are wrong; a temperature out of range is clamped in `kwargs`."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    max_new_tokens = kwargs.get("max_new_tokens")
    if max_new_tokens is not None and max_new_tokens <= 0:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}. Typical value: 128")
    if kwargs.get("temperature") is not None:
        low, high = TEMPERATURE_RANGE
        clamped = min(max(kwargs["temperature"], low), high)
        if clamped != kwargs["temperature"]:
            given = kwargs["temperature"]
            warnings.warn(f"temperature {given} is outside [{low}, {high}]: clamped to {clamped}", stacklevel=3)
        kwargs["temperature"] = clamped
