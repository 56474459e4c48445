"""Generation: `GenerationMixin` for prompts with panoramas."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.masking_utils import create_masks_for_generate

from .geometry_panorama import view_words
from .options_panorama import check_number, check_whole
from .outputs_panorama import CACHE, GenerationOutput, take_cache

TEMPERATURE_RANGE = (0.1, 1.0)

Panoramas = dict[str, Any]


def masks_with_image_blocks(
    config: PretrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor,
) -> Any:
    """Masks of a language model in which the tokens of one view see each other, as Gemma 3 has them (Gemma 4 in its
    sliding layers): each run of image tokens is a view; all else sees what is before it.

    Args:
        config: of the language model.
        inputs_embeds: [B, T, ...].
        attention_mask: [B, T] and what a cache holds, zero where padded; or bool [B, 1, T, T].
        cache, position_ids: as the language model gets them.
        token_type_ids: [B, T], 1 at image tokens.

    Returns:
        What the language model takes as its `attention_mask`.

    Raises:
        ValueError: for attention that knows no such mask.
    """
    if "flash" in str(config._attn_implementation):
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} cannot let the tokens of a view see each other "
            "(image_attention='bidirectional'): use 'sdpa' or 'eager'"
        )
    is_image = token_type_ids.eq(1)
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    blocks = torch.where(is_image, starts.long().cumsum(1) - 1, -1)  # [B, T]
    slides_alone = config.model_type == "gemma4_text"  # whose other layers see what is before them
    if attention_mask is not None and attention_mask.ndim == 4:
        both_ways = attention_mask | ((blocks[:, None] == blocks[:, :, None]) & is_image[:, None])[:, None]
        return {"full_attention": attention_mask, "sliding_attention": both_ways} if slides_alone else both_ways
    blocks = torch.nn.functional.pad(blocks, (int(cache.get_seq_length()) if cache is not None else 0, 0), value=-1)
    given = {"attention_mask": attention_mask, CACHE: cache, "position_ids": position_ids}
    if set(getattr(config, "layer_types", None) or ()) == {"full_attention", "sliding_attention"}:
        if slides_alone:
            from transformers.models.gemma4.modeling_gemma4 import create_masks_for_vision_model as create_masks
        else:
            from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model as create_masks
        return create_masks(config, inputs_embeds, block_sequence_ids=blocks, **given)
    return create_masks_for_generate(config, inputs_embeds, block_sequence_ids=blocks, **given)


class _Wider(LogitsProcessor):
    """A processor of scores [B, vocabulary] that gets some more words, which are never said."""

    def __init__(self, processor: LogitsProcessor, words: int):
        self.processor, self.words = processor, words

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wider = torch.nn.functional.pad(scores, (0, self.words), value=-torch.inf)
        return self.processor(input_ids, wider)[:, : scores.shape[1]]


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

        if (cache := take_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        panoramas = {"pixel_values": pixel_values, "view_mask": view_mask, "further_views": further_views}
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            panorope = self.config.position_encoding == "panorope" and pixel_values is not None
            if panorope and kwargs.get("position_ids") is None:
                masks = {"view_mask": view_mask, "further_views": further_views}
                positions = self.model.panorama_positions(input_ids, len(pixel_values), attention_mask, **masks)
                kwargs["position_ids"] = positions
            if self.config.image_positions == "grid" and kwargs.get("position_ids") is None:
                if attention_mask is not None and attention_mask.shape != input_ids.shape:
                    raise ValueError(
                        "with image_positions='grid' hand over the whole conversation, not what is new of it"
                    )
                kwargs["position_ids"] = self.model.grid_positions(input_ids, attention_mask)
            if self.config.image_attention == "bidirectional":
                kwargs.setdefault("token_type_ids", self.model.is_placeholder(input_ids).long())
            panoramas = self._not_yet_seen(input_ids, attention_mask, cache, panoramas)
            _check_guesses(self, input_ids, kwargs)
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        kwargs |= {name: value for name, value in panoramas.items() if value is not None}
        outputs = super().generate(inputs=input_ids, **kwargs)
        return self._with_text(outputs, input_ids, tokenizer)

    def _not_yet_seen(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, panoramas: Panoramas
    ) -> Panoramas:
        """The panoramas whose placeholders the cache does not hold: of a conversation that goes on, all are handed over
        again, with the whole of `input_ids`, and what was seen is not looked at twice.

        Raises:
            ValueError: where the cache holds more than `input_ids`, or ends in the middle of a panorama, and where a
                panorama that it does not hold is not there.
        """
        length = int(cache.get_seq_length()) if cache is not None else 0
        goes_on = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        if length == 0:
            return panoramas
        if goes_on and length >= input_ids.shape[1]:
            raise ValueError(
                f"past_key_values hold {length} tokens, and input_ids {input_ids.shape[1]}: hand over the whole "
                "conversation, or what is new of it with the attention_mask of the whole"
            )
        pixel_values, view_mask, further = panoramas.values()
        if pixel_values is None and self.model.is_placeholder(input_ids[:, length * goes_on :]).any():
            raise ValueError("input_ids hold <image> tokens that past_key_values do not: hand over their pixel_values")
        if pixel_values is None or not goes_on:
            return panoramas
        counts = torch.tensor(self.config.image_tokens_per_view)
        shown = torch.ones(len(pixel_values), len(counts)) if view_mask is None else view_mask.cpu()
        costs = (shown.bool() * counts).sum(1)  # [panoramas]
        if further is not None:
            costs = costs + further[..., 0].isfinite().sum(1).cpu() * self.config.tokens_per_view
        places = self.model.is_placeholder(input_ids).nonzero()[:, 1].cpu()  # in reading order, as the panoramas are
        if len(places) != costs.sum():
            return panoramas  # an error that names both follows
        new = torch.stack([(part >= length).any() for part in places.split(costs.tolist())])
        old = torch.stack([(part < length).any() for part in places.split(costs.tolist())])
        if (new & old).any():
            raise ValueError(f"past_key_values end at token {length}, in the middle of a panorama")
        return {name: value[new] if value is not None and new.any() else None for name, value in panoramas.items()}

    @staticmethod
    def create_masks_for_generate(config: Any, token_type_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Masks for caches of a fixed size, made before the step is compiled; `generate` calls it."""
        kwargs.pop("is_first_iteration", None), kwargs.pop("mm_token_type_ids", None)
        if token_type_ids is None or token_type_ids.shape[1] == 1:
            return create_masks_for_generate(config, **kwargs)
        kwargs.pop("block_sequence_ids", None)
        kwargs["cache"] = take_cache(kwargs)
        return masks_with_image_blocks(config.get_text_config(), token_type_ids=token_type_ids, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """As `GenerationMixin` does; what was seen of the panoramas also reaches an assistant model, for which nothing
        is a first step."""
        cache = take_cache(kwargs)
        inputs = super().prepare_inputs_for_generation(input_ids, **{CACHE: cache}, **kwargs)
        if cache is None or not cache.get_seq_length():
            inputs.setdefault("mm_encoder_outputs", kwargs.get("mm_encoder_outputs"))
        return inputs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As `GenerationMixin` does; one more keeps `<image>` from being guessed, though its logit is the lowest. Where
        its id lies outside the vocabulary, they see scores that have a place for it."""
        processors = super()._get_logits_processor(*args, **kwargs)
        token = self.config.image_token_id
        if token is None:
            return processors
        missing = token + 1 - self.config.text_config.vocab_size
        if missing <= 0:
            return LogitsProcessorList([*processors, SuppressTokensLogitsProcessor([token], device=self.device)])
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor  # it compares with what the model itself says
        return LogitsProcessorList([p if isinstance(p, guidance) else _Wider(p, missing) for p in processors])

    @staticmethod
    def _with_text(
        outputs: Any, prompt: torch.Tensor | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> torch.Tensor | GenerationOutput:
        """What was generated, in words too where there is a tokenizer."""
        if isinstance(outputs, torch.Tensor):
            return outputs
        known = {name: outputs.get(name) for name in GenerationOutput.__dataclass_fields__ if name in outputs}
        known["generated_ids"] = known["sequences"][:, 0 if prompt is None else prompt.shape[1] :]
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
        words = _ids(tokenizer, words)
        config = self.config
        before = [_ids(tokenizer, view_words(v, config.view_text) + config.view_prefix) for v in config.view_plan.views]
        behind = _ids(tokenizer, config.view_suffix)
        counts = config.image_tokens_per_view
        views = [a + [config.image_token_id] * n + behind for a, n in zip(before, counts, strict=True)]
        shown = torch.ones(len(pixel_values), len(counts)) if view_mask is None else view_mask.cpu()
        images = [[token for view, there in zip(views, row, strict=True) if there for token in view] for row in shown]
        width = max(map(len, images))
        padded = [[0] * (width - len(tokens)) for tokens in images]  # on the left
        ids = torch.tensor([zeros + tokens + words for zeros, tokens in zip(padded, images, strict=True)])
        mask = torch.tensor([zeros + [1] * (len(row) - len(zeros)) for zeros, row in zip(padded, ids, strict=True)])
        return ids.to(pixel_values.device), mask.to(pixel_values.device)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


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


def _check_guesses(model: Any, prompt: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse what guesses the next tokens where it cannot read the prompt."""
    config, assistant = kwargs.get("generation_config") or model.generation_config, kwargs.get("assistant_model")
    looks_up = kwargs.get("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens) is not None
    if not (looks_up or assistant is not None) or not model.model.is_placeholder(prompt).any():
        return
    token, words = model.config.image_token_id, model.config.text_config.vocab_size
    if looks_up and token >= words:
        raise ValueError(
            f"prompt_lookup_num_tokens: the prompt holds <image>, number {token}, but the language model has "
            f"{words} words: model.resize_token_embeddings({token + 1}) makes room for it"
        )
    if assistant is None:
        return
    words = assistant.get_input_embeddings().num_embeddings
    widths = [each.get_input_embeddings().embedding_dim for each in (assistant, model)]
    if isinstance(assistant, PanoramaGenerationMixin):
        if widths[0] != widths[1]:
            raise ValueError(
                f"assistant_model reads panoramas of width {widths[0]}, but they are shown to the model with "
                f"{widths[1]}: take one of the same width, or a language model"
            )
    elif token >= words:
        raise ValueError(
            f"assistant_model has {words} words, and the prompt holds <image>, which is number {token}: take one whose "
            "table of embeddings has it"
        )


def _check_arguments(tensors: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `generate` that are wrong; a temperature out of range is clamped in `kwargs`."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if kwargs.get("max_new_tokens") is not None:
        kwargs["max_new_tokens"] = check_whole("max_new_tokens", kwargs["max_new_tokens"], 128)
    if kwargs.get("temperature") is not None:
        check_number("temperature", kwargs["temperature"], 1.0, least=-math.inf)
        low, high = TEMPERATURE_RANGE
        clamped = min(max(kwargs["temperature"], low), high)
        if clamped != kwargs["temperature"]:
            given = kwargs["temperature"]
            warnings.warn(f"temperature {given} is outside [{low}, {high}]: clamped to {clamped}", stacklevel=3)
        kwargs["temperature"] = clamped
