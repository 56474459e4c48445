"""Pretrained vision-language models taken apart: where each family has its tower, connector, language model and head,
and as which resampler and projection of ours the connector lives on."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.configuration_utils import PretrainedConfig

from .composing_panorama import language_parts, public_name
from .configuration_panorama import PanoramaConfig
from .resampler_panorama import UnitOffsetNorm
from .towers_panorama import check_class, tower_of

logger = logging.getLogger(__name__)

Options = dict[str, Any]

VIEW_TEXT = "{direction}: "  # a model that never heard of rays is told in words which way a view looks
NEWLINE = "<image_newline>"  # the learned vector that some put behind an image, as a row of the table of embeddings


@dataclass(frozen=True)
class Family:
    """How a vision-language model of one `model_type` is taken apart.

    Args:
        options: its configuration -> options of :class:`PanoramaConfig`.
        names: how the names of the connector's weights begin, and what they are called in the projection.
        tower, connector: what they are called in its base model; no connector where the tower holds it.
        around: what its processor writes before and behind the tokens of an image that is not cut into tiles, with
            `{name}` for the tokens below.
        tokens: tokens that its tokenizer knows by a name, and what they are where it does not.
        placeholder: what its chat template writes for an image, with `{name}` too.
        transposed: weights of the connector that are [in, out].
        newline: what the vector behind an image is called in its base model.
        size: its image processor -> the side in pixels of the square images that a tower for any size is shown.
        left: parts of its base model that have nothing to do with images, and are left out.
        plain_head: whether it leaves out how its language model alone would scale or cap its logits.
    """

    options: Callable[[Any], Options]
    names: Mapping[str, str] = field(default_factory=lambda: {"linear_1.": "layers.0.", "linear_2.": "layers.2."})
    tower: str = "vision_tower"
    connector: str | None = "multi_modal_projector"
    around: tuple[str, str] = ("", "")
    tokens: Mapping[str, str] = field(default_factory=dict)
    placeholder: str = "{image_token}"
    transposed: tuple[str, ...] = ()
    newline: str | None = None
    size: Callable[[Any], int] | None = None
    left: tuple[str, ...] = ()
    plain_head: bool = True

    def said(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
        """What is written before and behind the tokens of an image, and for an image."""
        tokens = {name: getattr(tokenizer, name, None) or default for name, default in self.tokens.items()}
        tokens.setdefault("image_token", getattr(tokenizer, "image_token", None) or "<image>")
        before, behind, placeholder = (text.format(**tokens) for text in (*self.around, self.placeholder))
        return before, behind, placeholder


class Source(NamedTuple):
    """What the processor of a vision-language model has; it itself may need packages that nothing here does, such as
    torchvision for videos."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    chat_template: Any


def _features(config: Any) -> Options:
    """Which hidden states are shown, and whether CLS, which looks nowhere, is left out."""
    cls = config.vision_config.model_type in ("clip_vision_model", "dinov2", "internvl_vision", "vit")
    strategy = getattr(config, "vision_feature_select_strategy", "default" if cls else "full")
    if (strategy == "default") != cls:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} with a tower of type {config.vision_config.model_type!r} "
            + ("shows CLS, which looks nowhere" if cls else "leaves out the first patch")
            + ": train such a model's parts with from_vision_text_pretrained instead"
        )
    return {"vision_feature_layer": config.vision_feature_layer}


def _mlp(config: Any) -> Options:
    bias = getattr(config, "multimodal_projector_bias", True)
    return {
        "resampler_type": "identity",
        "projection_activation": config.projector_hidden_act,
        "projection_bias": bias,
        **_features(config),
    }


def _vipllava(config: Any) -> Options:
    norm = {"projection_norm": "layer", "projection_norm_eps": config.projector_layernorm_eps}
    return {**_mlp(config), **norm}


def _idefics3(config: Any) -> Options:
    return {
        "resampler_type": "pixel_shuffle",
        "resampler_pool": config.scale_factor,
        "projection_depth": 1,
        "projection_bias": False,
    }


def _internvl(config: Any) -> Options:
    features = _features(config)
    if features["vision_feature_layer"] == -1:  # then it takes the tower's output, behind its norm
        features = {}
    return {
        "resampler_type": "pixel_shuffle",
        "resampler_pool": round(1 / config.downsample_ratio),
        "projection_activation": config.projector_hidden_act,
        "projection_norm": "layer",
        "projection_norm_eps": 1e-5,
        **features,
    }


def _gemma3(config: Any) -> Options:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return {
        "resampler_type": "avg_pool",
        "resampler_depth": 0,
        "resampler_pool": side // round(config.mm_tokens_per_image**0.5),
        "projection_depth": 1,
        "projection_bias": False,
        "projection_norm": "rms",
        "projection_norm_eps": vision.layer_norm_eps,
        "image_attention": "bidirectional",
    }


def _lfm2_vl(config: Any) -> Options:
    norm = {"projection_norm": "layer", "projection_norm_eps": 1e-5} if config.projector_use_layernorm else {}
    return {
        "resampler_type": "pixel_shuffle",
        "resampler_pool": config.downsample_factor,
        "projection_activation": config.projector_hidden_act,
        "projection_hidden": config.projector_hidden_size,
        "projection_bias": config.projector_bias,
        **norm,
    }


def _gemma4(config: Any) -> Options:
    both_ways = config.get_text_config().use_bidirectional_attention == "vision"
    return {
        "resampler_type": "identity",
        "projection_depth": 1,
        "projection_bias": False,
        "projection_norm": "rms",
        "projection_norm_eps": config.vision_config.rms_norm_eps,
        "image_attention": "bidirectional" if both_ways else "causal",
    }


def _lfm3_vl(config: Any) -> Options:
    return {
        "resampler_type": "identity",
        "projection_activation": config.projector_hidden_act,
        "projection_hidden": config.projector_hidden_size,
        "projection_bias": config.projector_bias,
        "projection_norm": "layer",
        "projection_norm_eps": 1e-6,
        "projection_norm_parts": config.vision_config.spatial_merge_size**2,
    }


def _qwen_vl(config: Any) -> Options:
    return {"resampler_type": "identity", "projection_depth": 0, "image_positions": "grid"}


def _gemma4_size(processor: Any) -> int:
    cell = processor.patch_size * processor.pooling_kernel_size
    return int(processor.max_soft_tokens**0.5) * cell


def _cohere2_vision(config: Any) -> Options:
    return {
        "resampler_type": "pixel_shuffle",
        "resampler_pool": config.downsample_factor,
        "projection_activation": "swiglu",
        "projection_hidden": config.alignment_intermediate_size,
    }


def _aya_vision(config: Any) -> Options:
    return {
        "resampler_type": "pixel_shuffle",
        "resampler_pool": config.downsample_factor,
        "projection_activation": "swiglu",
        "projection_hidden": getattr(config, "alignment_intermediate_size", config.text_config.hidden_size),
        "projection_norm": "layer",
        "projection_norm_eps": config.adapter_layer_norm_eps,
        **_features(config),
    }


_TWO = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
_IDEFICS3 = Family(
    _idefics3,
    {"modality_projection.proj.": "layers.0."},
    tower="vision_model",
    connector="connector",
    around=("{fake_image_token}{global_image_token}", "{fake_image_token}"),
    tokens={"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
)
# Around an image in the chat template itself; a view of 16 x 16 tokens.
_VISION_START: dict[str, Any] = {
    "around": ("<|vision_start|>", "<|vision_end|>"),
    "placeholder": "<|vision_start|><|image_pad|><|vision_end|>",
    "size": lambda processor: 16 * processor.patch_size * processor.merge_size,
}
_QWEN_VL = Family(_qwen_vl, {}, tower="visual", connector=None, **_VISION_START)
FAMILIES: dict[str, Family] = {
    "aya_vision": Family(
        _aya_vision,
        {"layernorm.": "norm.", **_TWO},
        around=("<|START_OF_IMG|>TILE_GLOBAL", "<|END_OF_IMG|>"),
        placeholder="<image>",
    ),
    "cohere2_vision": Family(
        _cohere2_vision,
        around=("{boi_token}", "{img_line_break_token}{eoi_token}"),
        tokens={
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
            "image_token": "<|IMG_PATCH|>",
        },
    ),
    "gemma4": Family(
        _gemma4,
        {"embedding_projection.": "layers.0."},
        connector="embed_vision",
        around=("{boi_token}", "{eoi_token}"),
        tokens={"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"},
        size=_gemma4_size,
        left=("audio_tower", "embed_audio"),
        plain_head=False,
    ),
    "gemma3": Family(
        _gemma3,
        {"mm_input_projection_weight": "layers.0.weight", "mm_soft_emb_norm.": "norm."},
        around=("\n\n{boi_token}", "{eoi_token}\n\n"),
        tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        placeholder="{boi_token}",
        transposed=("mm_input_projection_weight",),
    ),
    "idefics3": _IDEFICS3,
    "internvl": Family(
        _internvl,
        {"layer_norm.": "norm.", **_TWO},
        around=("{start_image_token}", "{end_image_token}"),
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
        placeholder="{context_image_token}",
    ),
    "lfm2_vl": Family(
        _lfm2_vl,
        {"layer_norm.": "norm.", **_TWO},
        around=("{image_start_token}", "{image_end_token}"),
        tokens={"image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"},
        size=lambda processor: processor.tile_size,
    ),
    "lfm3_vl": Family(_lfm3_vl, {"layer_norm.": "norm.", **_TWO}, **_VISION_START),
    "llava": Family(_mlp),
    "llava_next": Family(_mlp, newline="image_newline"),
    "llava_onevision": Family(_mlp, newline="image_newline"),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"), _QWEN_VL),
    "smolvlm": _IDEFICS3,
    "vipllava": Family(_vipllava, {"projector_layernorm.": "norm.", **_TWO}),
}
_MROPE = "gives each image token positions of three axes (M-RoPE) in a way that was not looked into"
_ANY_SIZE = "takes images at their own size, and its tower and connector know no square view"
_TIMM = "has a tower of timm, which gives no grid of tokens that could be checked here"
# Why others cannot be taken apart so that each view is shown as they would show it.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("glm4v", "glm4v_moe", "ernie4_5_vl_moe"), _MROPE),
    **dict.fromkeys(("mistral3", "pixtral", "kimi_vl", "gemma3n"), _ANY_SIZE),
    **dict.fromkeys(("fast_vlm", "perception_lm"), _TIMM),
    "qwen2_vl": "has a tower that AutoModel does not make, so that no saved folder could be loaded; take a Qwen2.5-VL",
    "internvl_chat": "is code of its repository's own; the same weights are there with '-hf' behind the name",
    "mllama": "shows images to its language model through cross attention, and not as tokens",
    "paligemma": "reads its whole prompt in both directions, the words too, and answers tasks and no chats",
}
_TAKE = (
    "Take one of type {known}, such as HuggingFaceTB/SmolVLM2-2.2B-Instruct, google/gemma-3-4b-it or "
    "OpenGVLab/InternVL3_5-1B-HF; or compose a new model of its parts with from_vision_text_pretrained"
)


def family_of(config: PretrainedConfig) -> Family:
    """How a vision-language model is taken apart. Raises `ValueError` for one that cannot be, and says why."""
    kind = config.model_type
    if not isinstance(kind, str) or kind not in FAMILIES:
        reason = REFUSED.get(kind, "is not known here") if isinstance(kind, str) else "is not known here"
        raise ValueError(
            f"a vision-language model of type {kind!r} {reason}. " + _TAKE.format(known=", ".join(sorted(FAMILIES)))
        )
    return FAMILIES[kind]


def named_vlm(vlm: Any) -> str | PreTrainedModel:
    """A vision-language model, or its name; folders may be paths. Raises `ValueError` for what is neither."""
    if isinstance(vlm, PreTrainedModel):
        return vlm
    if not isinstance(vlm, str | os.PathLike) or not str(vlm):
        raise ValueError(f"vlm must be a Hub id, a folder, or a model of transformers, got {vlm!r:.200}")
    return os.fspath(vlm)


def vlm_source(vlm: str | PreTrainedModel, processor: Any, vlm_kwargs: Mapping[str, Any] | None) -> Source:
    """What is needed of the processor of a vision-language model: of the given one, or of that of its name."""
    if isinstance(processor, Source):
        return processor
    if processor is not None:
        return Source(processor.tokenizer, processor.image_processor, getattr(processor, "chat_template", None))
    if not isinstance(vlm, str):
        raise ValueError("processor must be given where the vision-language model is given as a model")
    kwargs = {name: value for name, value in (vlm_kwargs or {}).items() if name not in _OF_MODELS}
    return Source(
        AutoTokenizer.from_pretrained(vlm, **kwargs),
        AutoImageProcessor.from_pretrained(vlm, **kwargs),
        ProcessorMixin.get_processor_dict(vlm, **kwargs)[0].get("chat_template"),
    )


_OF_MODELS = ("attn_implementation", "device_map", "dtype", "quantization_config", "torch_dtype")


def vlm_config(vlm: str | PreTrainedModel, vlm_kwargs: Mapping[str, Any] | None) -> Any:
    """The configuration of a vision-language model."""
    if not isinstance(vlm, str):
        return vlm.config
    kwargs = {name: value for name, value in (vlm_kwargs or {}).items() if name not in _OF_MODELS}
    return AutoConfig.from_pretrained(vlm, **kwargs)


def vlm_options(vlm: str | PreTrainedModel, config: Any, source: Source, options: Options) -> Options:
    """Options of the :class:`PanoramaConfig` of a model made from a vision-language model.

    Args:
        vlm: its name goes into the record.
        config: its configuration, which stays as it is.
        source: of its processor. A token for the vector behind an image is added to the tokenizer where there is one.
        options: what is wanted otherwise.

    Raises:
        ValueError: for a family that cannot be taken apart, and options that are its own.
    """
    family = family_of(config)
    try:
        own = family.options(config)
    except (AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"the configuration of type {config.model_type!r} is not one of its family: {error}"
        ) from error
    if wrong := sorted(name for name in own if name in options and options[name] != own[name]):
        raise ValueError(f"{', '.join(wrong)} cannot be chosen: a model of type {config.model_type!r} has its own")
    vision, text = copy.deepcopy(config.vision_config), copy.deepcopy(config.get_text_config())
    if own.get("vision_feature_layer") is not None:
        layers = own["vision_feature_layer"]
        layers = tower_of(vision, [layers] if isinstance(layers, int) else layers).layers
        own["vision_feature_layer"], vision.num_hidden_layers = list(layers), max(layers)
    if family.plain_head:
        _with_plain_head(text)
    if family.size is not None:
        own["image_size"] = options.get("image_size") or family.size(source.image_processor)
    before, behind, _ = family.said(source.tokenizer)
    silent = []
    if family.newline is not None:
        source.tokenizer.add_tokens([NEWLINE], special_tokens=True)
        silent, behind = [source.tokenizer.convert_tokens_to_ids(NEWLINE)], behind + NEWLINE
    defaults = {
        "image_token_id": config.image_token_id,
        "token_selection": "all",
        "view_text": VIEW_TEXT,
        "view_prefix": before,
        "view_suffix": behind,
        "silent_token_ids": silent,
        "vision_config": vision,
        "text_config": text,
    }
    if isinstance(vlm, str):
        defaults["vlm_name"] = public_name(vlm)
    return {**defaults, **options, **own}


def vlm_parts(
    vlm: str | os.PathLike[str] | PreTrainedModel,
    processor: Any,
    vlm_kwargs: Mapping[str, Any] | None,
    options: Options,
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, torch.Tensor], Options]:
    """The tower, the language model with its head, the weights of the projection, and the options of their
    :class:`PanoramaConfig`; see :meth:`PanoramaVLM.from_vlm_pretrained`."""
    vlm = named_vlm(vlm)
    config = vlm_config(vlm, vlm_kwargs)
    options = vlm_options(vlm, config, vlm_source(vlm, processor, vlm_kwargs), options)
    family = family_of(config)
    if isinstance(vlm, str):
        vlm = AutoModelForImageTextToText.from_pretrained(vlm, **(vlm_kwargs or {}))
    base = vlm.base_model
    tower = getattr(base, family.tower)
    connector = getattr(base, family.connector) if family.connector else nn.Module()
    check_class(tower)
    body, head = language_parts(vlm)
    left = [name for name in family.left if getattr(base, name, None) is not None]
    if left:
        logger.info("Left out: %s, which have nothing to do with images.", ", ".join(left))
    others = [getattr(base, name) for name in (*left, *([family.newline] if family.newline else []))]
    _check_all_taken(vlm, [tower, connector, body, head, *others])
    tower = _cut(tower, options["vision_config"].num_hidden_layers)
    _make_rows(vlm, [options["image_token_id"], *options["silent_token_ids"]])
    if family.newline is not None:
        for token in options["silent_token_ids"]:
            body.get_input_embeddings().weight.data[token] = getattr(base, family.newline).data
    if family.plain_head:
        _with_plain_head(body.config)
    body.config.vocab_size = body.get_input_embeddings().weight.shape[0]
    body.config.tie_word_embeddings = vlm.get_output_embeddings().weight is body.get_input_embeddings().weight
    parts = {"vision_config": tower.config, "text_config": body.config}
    attention = {name: part._attn_implementation for name, part in parts.items()}
    return tower, vlm, _renamed(connector, family), {**options, **parts, "attn_implementation": attention}


def _with_plain_head(text: PretrainedConfig) -> None:
    """A language model alone may scale or cap its logits; the classes of vision-language models take them as they
    are."""
    plain = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
    for name, value in plain.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)


def _check_all_taken(vlm: PreTrainedModel, taken: list[Any]) -> None:
    """Raise for weights that would be lost."""
    known: set[int] = set()
    for part in taken:
        known |= {id(part)} if isinstance(part, nn.Parameter) else {id(p) for p in part.parameters()}
    if lost := [name for name, parameter in vlm.named_parameters() if id(parameter) not in known]:
        raise ValueError(
            f"{type(vlm).__name__} has weights that have no place here: {', '.join(lost[:5])}"
            f"{f' and {len(lost) - 5} more' * (len(lost) > 5)}"
        )


def _cut(tower: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The tower without the blocks that come behind the last one whose features are shown; a copy, if there are any."""
    there = getattr(tower.config, "num_hidden_layers", depth)
    if there == depth:
        return tower
    tower = copy.deepcopy(tower)
    name, blocks = next((n, m) for n, m in tower.named_modules() if isinstance(m, nn.ModuleList) and len(m) == there)
    del blocks[depth:]
    tower.config.num_hidden_layers = depth
    logger.info("Left out: %s[%d:] of the tower, behind the features that the language model is shown.", name, depth)
    return tower


def _make_rows(vlm: PreTrainedModel, tokens: list[int]) -> None:
    """Rows in the table of embeddings for tokens that have none."""
    if max(tokens) >= vlm.get_input_embeddings().weight.shape[0]:
        vlm.resize_token_embeddings(max(tokens) + 1, mean_resizing=False)


def _renamed(connector: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """The weights of a connector as those of our projection. Raises `ValueError` for one that has no place there."""
    weights = {}
    for name, weight in connector.state_dict().items():
        found = next((prefix for prefix in family.names if name.startswith(prefix)), None)
        if found is None:
            raise ValueError(f"the connector {type(connector).__name__} has weights that have no place here: {name}")
        weight = weight.T if name in family.transposed else weight
        weights[family.names[found] + name[len(found) :]] = weight
    return weights


def load_projection(projection: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put a connector's weights into a :class:`PanoramaProjection`, whose code of the ray adds nothing at first."""
    missing, unknown = projection.load_state_dict(weights, strict=False)
    if isinstance(getattr(projection, "norm", None), UnitOffsetNorm) and "norm.weight" in missing:
        missing.remove("norm.weight")  # a norm that scales nothing, as this one does before it has learned
    if unknown or set(missing) - {"ray.weight"}:
        raise ValueError(f"the connector does not fit the projection: missing {missing}, unknown {unknown}")
    if "ray.weight" in missing:
        nn.init.zeros_(projection.get_parameter("ray.weight"))


def vlm_reading(
    vlm: str | os.PathLike[str] | PreTrainedModel,
    processor: Any,
    vlm_kwargs: Mapping[str, Any] | None,
    options: Options,
) -> tuple[Source, PanoramaConfig, str]:
    """For the processor of a model made from a vision-language model: what its own processor has, the configuration of
    the model, and what its chat template writes for an image."""
    vlm = named_vlm(vlm)
    source = vlm_source(vlm, processor, vlm_kwargs)
    config = vlm_config(vlm, vlm_kwargs)
    made = PanoramaConfig(**vlm_options(vlm, config, source, options))
    return source, made, family_of(config).said(source.tokenizer)[2]
