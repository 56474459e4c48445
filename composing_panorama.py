"""What a model is composed of: a pretrained vision tower, and a pretrained language model as body and head."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.configuration_utils import PretrainedConfig

from .configuration_panorama import IMAGE_TOKEN
from .towers_panorama import check_class, load_tower


def parts_from_pretrained(
    vision: str | PreTrainedModel,
    language: str | PreTrainedModel,
    vision_kwargs: dict[str, Any] | None,
    language_kwargs: dict[str, Any] | None,
    options: dict[str, Any],
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    """The vision tower, the language model and the options of their :class:`PanoramaConfig`; see
    :meth:`PanoramaVLM.from_vision_text_pretrained`."""
    vision_kwargs, language_kwargs = vision_kwargs or {}, language_kwargs or {}
    options = dict(options)
    if isinstance(vision, str):
        options.setdefault("vision_name", public_name(vision))
        vision_config = AutoConfig.from_pretrained(vision, **vision_kwargs)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        vision = load_tower(vision, vision_config, **vision_kwargs)
    check_class(vision)
    if isinstance(language, str):
        options.setdefault("language_model_name", public_name(language))
        if options.get("image_token_id") is None:
            tokenizer = AutoTokenizer.from_pretrained(language, **language_kwargs)
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
            options["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        language = AutoModelForCausalLM.from_pretrained(language, **language_kwargs)
    if options.get("image_token_id") is None:
        raise ValueError(
            "image_token_id must be given where the language model is given as a model; "
            "it is PanoramaProcessor.image_token_id"
        )
    _forget_gguf(language)
    text_config = language.config.get_text_config()
    if options["image_token_id"] >= text_config.vocab_size:
        # A row for <image>, so that whoever looks ids up finds one: about the mean of the others, so that its logit is
        # about the mean of the others, and never the largest, where a serving engine brings its own head.
        language.resize_token_embeddings(options["image_token_id"] + 1)
    attention = {"vision_config": vision.config, "text_config": text_config}
    options["attn_implementation"] = {part: config._attn_implementation for part, config in attention.items()}
    return vision, language, {**options, "vision_config": vision.config, "text_config": text_config}


def public_name(name: str) -> str:
    """A Hub id as it is; of a folder its own name: what is saved says nothing about the disk it lay on."""
    return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name


def language_parts(language: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module]:
    """The body and the head of a language model with a head; of a vision-language model those of its language model.

    The body is of the class that `AutoModel` makes of the text configuration: else a saved model could not be loaded.

    Raises:
        ValueError: for a model that has no such body, or no head.
    """
    text_config = language.config.get_text_config()
    wanted = MODEL_MAPPING[type(text_config)] if type(text_config) in MODEL_MAPPING else type(language.base_model)
    body = next((module for module in language.modules() if type(module) is wanted), None)
    head = language.get_output_embeddings()
    if body is None or head is None:
        missing = f"a {getattr(wanted, '__name__', wanted)}" if body is None else "a head"
        raise ValueError(
            f"a language model must hold {missing}, what AutoModel and AutoModelForCausalLM make of a text "
            f"configuration of type {text_config.model_type!r}; {type(language).__name__} does not"
        )
    return body, head


def new_language(text_config: PretrainedConfig) -> tuple[PreTrainedModel, nn.Module]:
    """The body and the head of a language model with random weights; of one that is only part of a vision-language
    model, for which `AutoModelForCausalLM` has no class, the head is the plain one."""
    if type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return language_parts(AutoModelForCausalLM.from_config(text_config))
    body = AutoModel.from_config(text_config)
    return body, nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)


def _forget_gguf(language: PreTrainedModel) -> None:
    """A model read from a GGUF file without special kernels has plain weights, but its configuration still says GGUF,
    and what is saved could not be loaded and saved again."""
    quantization = getattr(language.config, "quantization_config", None)
    if str(getattr(quantization, "quant_method", "")).split(".")[-1].lower() != "gguf":
        return
    if not all(parameter.is_floating_point() for parameter in language.parameters()):
        raise ValueError(
            "the language model keeps the blocks of its GGUF file, which cannot be trained or saved; load it with "
            "quantization_config=GgufConfig(dequantize=True)"
        )
    del language.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in language.__dict__:
            delattr(language, name)
