"""What a run starts from, a saved model or a new one composed of two others, and how it is spread for training."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..composing_panorama import public_name
from ..configuration_panorama import PanoramaConfig
from ..image_processing_panorama import READ_OPTIONS
from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import IMAGE_TOKEN, PanoramaProcessor
from ..stages_panorama import part_of
from .config import ComposeConfig, TrainConfig
from .optimizers import make_optimizer
from .stage import Stage


def check_parts(config: TrainConfig, start: str | None = None) -> None:
    """See that what a run starts from is there and fits, without loading weights.

    Args:
        config: of the run.
        start: a folder of the run's own from which it goes on.

    Raises:
        ValueError: for a model, tower, language model or tokenizer that is not there, or options that do not fit.
    """
    model = start or config.model
    if (vlm := starting_vlm(config, start)) is not None:
        PanoramaProcessor.from_vlm_pretrained(vlm.vlm, vlm_kwargs=vlm.vlm_kwargs, **config.options)
        return
    if model is not None:
        _found("model", model, PanoramaConfig.from_pretrained, **config.options)
        return
    parts = config.compose
    _tokenizer(parts)
    configs = {}
    for name, of_which, kwargs in (
        ("vision", parts.vision, parts.vision_kwargs),
        ("language", parts.language, parts.language_kwargs),
    ):
        kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
        configs[name] = (
            _found(f"compose.{name}", of_which, AutoConfig.from_pretrained, **kwargs)
            if isinstance(of_which, str)
            else part_config(f"compose.{name}", of_which)
        )
    PanoramaConfig(configs["vision"], configs["language"], **config.options)


def part_config(option: str, written: Any) -> PretrainedConfig:
    """The configuration of a tower or language model that is written down instead of named.

    Args:
        option: where, for the message.
        written: a dict with its `model_type`.

    Raises:
        ValueError: for what is none, or holds what its family refuses.
    """
    if not isinstance(written, dict) or not isinstance(written.get("model_type"), str):
        raise ValueError(
            f"{option} must be a Hub id, a folder, or a configuration with its model_type, got {written!r}"
        )
    try:
        return AutoConfig.for_model(**written)
    except Exception as error:  # of whatever kind its family's checks raise
        raise ValueError(f"{option} {written!r} is no configuration: {' '.join(str(error).split())[:400]}") from error


def starting_vlm(config: TrainConfig, start: str | None) -> ComposeConfig | None:
    """The vision-language model that a run starts from, by `compose.vlm` or `--model`; none where it goes on from a
    folder of its own."""
    if start is not None:
        return None
    parts = config.compose
    if config.model is not None:
        found = _found("model", config.model, PretrainedConfig.get_config_dict)[0].get("model_type")
        if found is None:
            raise ValueError(f"model: {config.model!r} holds no config.json with a model_type")
        return ComposeConfig(vlm=config.model) if found != PanoramaConfig.model_type else None
    if parts.vlm is not None:
        _found("compose.vlm", parts.vlm, PretrainedConfig.get_config_dict)
    return None if parts.vlm is None else parts


def _found(what: str, name: str, load: Any, **kwargs: Any) -> Any:
    """What `load` gives of a name; a sentence where there is nothing of the kind."""
    try:
        return load(name, **kwargs)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{what}: {name!r} is no folder here and no repo that the Hub gives: {reason}") from error


def load_start(config: TrainConfig, model: str | None = None) -> tuple[PanoramaVLM, PanoramaProcessor]:
    """The model and processor that a stage starts from, in float32: mixed precision is a matter of `accelerate launch`.

    Args:
        config: of the run.
        model: folder of the stage before; without it what the configuration names.
    """
    if (vlm := starting_vlm(config, model)) is not None:
        return from_vlm(vlm, config.options)
    model = model or config.model
    if model is None:
        return compose(config.compose, config.options)
    loaded = PanoramaVLM.from_pretrained(model, dtype=torch.float32, **config.options)
    saved = PanoramaProcessor.from_pretrained(model)
    statistics = {name: getattr(saved.image_processor, name) for name in ("image_mean", "image_std")}
    processor = PanoramaProcessor.from_config(
        loaded.config, saved.tokenizer, image_token=saved.image_token, **statistics
    )
    processor.chat_template = saved.chat_template
    for name in (*READ_OPTIONS, "min_seen"):
        setattr(processor.image_processor, name, getattr(saved.image_processor, name))
    return loaded, processor


def from_vlm(parts: ComposeConfig, options: dict[str, Any]) -> tuple[PanoramaVLM, PanoramaProcessor]:
    """A model made from a pretrained vision-language model, and its processor."""
    kwargs = {"dtype": torch.float32, **parts.vlm_kwargs}
    model = PanoramaVLM.from_vlm_pretrained(parts.vlm, vlm_kwargs=kwargs, **options)
    return model, PanoramaProcessor.from_vlm_pretrained(parts.vlm, vlm_kwargs=kwargs, **options)


def compose(parts: ComposeConfig, options: dict[str, Any]) -> tuple[PanoramaVLM, PanoramaProcessor]:
    """A new model and its processor."""
    tokenizer = _tokenizer(parts)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    language, vision = parts.language, parts.vision
    if isinstance(language, str):
        options = {"language_model_name": public_name(language), **options}
        language = AutoModelForCausalLM.from_pretrained(language, **{"dtype": torch.float32, **parts.language_kwargs})
    else:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        made = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **language})
        language = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    statistics: dict[str, Any] = {}
    if isinstance(vision, str):
        mean, std = PanoramaProcessor.image_statistics(vision, parts.vision_kwargs)
        statistics = {"image_mean": mean, "image_std": std}
    else:
        vision = AutoModel.from_config(AutoConfig.for_model(**vision), dtype=torch.float32)
    model = PanoramaVLM.from_vision_text_pretrained(
        vision,
        language,
        vision_kwargs={"dtype": torch.float32, **parts.vision_kwargs} if isinstance(vision, str) else None,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        **options,
    )
    return model, PanoramaProcessor.from_config(model.config, tokenizer, **statistics)


def frozen_at_random(config: TrainConfig, model: PanoramaVLM, stage: str) -> list[str]:
    """In words, which part of a model that the run composes has random weights and stays frozen where it could train.

    Args:
        config: of the run; of what `model` names it says not whether it was trained.
        model: whose stage is set.
        stage: that is set.
    """
    first = {
        "vision": ("vision_tower", config.compose.vision, "vision_trainable_blocks", "all"),
        "resampler": ("language_model", config.compose.language, "resampler_language_model", "true"),
    }
    if stage not in first:
        return []
    part, made_of, option, value = first[stage]
    trains = any(part_of(name) == part and p.requires_grad for name, p in model.named_parameters())
    if trains or made_of is None or isinstance(made_of, str):
        return []
    return [
        f"The {part.replace('_', ' ')} has random weights and stays frozen in stage {stage!r}: what trains is "
        f"fitted to them. --options.{option} {value} trains it too."
    ]


def _tokenizer(parts: ComposeConfig) -> Any:
    if parts.tokenizer == "bytes":
        return bytes_tokenizer()
    if parts.tokenizer is not None:
        return _found("compose.tokenizer", parts.tokenizer, AutoTokenizer.from_pretrained)
    if not isinstance(parts.language, str):
        raise ValueError(
            "compose.tokenizer must name a Hub id or folder, or be `bytes`, where compose.language is a configuration"
        )
    names = {name: value for name, value in parts.language_kwargs.items() if name != "dtype"}
    return _found("compose.language", parts.language, AutoTokenizer.from_pretrained, **names)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, and an end of text: for small experiments with random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def check_packing(model: PanoramaVLM) -> None:
    """See that a language model lets no packed question see another: what its layers carry on beside attention (Mamba,
    convolutions, recurrence) knows no mask.

    Raises:
        ValueError: for one that does, or whose layers see less than the longest sample.
    """
    text, body = model.config.text_config, model.model
    if model.config.image_positions == "grid":
        raise ValueError(
            "independent_questions: with image_positions='grid' the questions of one row would need positions of three "
            "axes that begin again. Set it to 0"
        )
    longest = model.config.num_image_tokens + model.config.max_text_length
    window, layers = getattr(text, "sliding_window", None), getattr(text, "layer_types", None) or ["sliding_attention"]
    if window and window < longest and "sliding_attention" in layers:
        raise ValueError(
            f"independent_questions needs layers that see the whole sample, and those of {text.model_type!r} see "
            f"{window} positions, where a sample has up to {longest}: lower max_text_length, or set it to 0"
        )
    block = torch.tensor([0, 0, 1, 1, 2, 2])  # what all share, and two questions
    mask = ((block[:, None] == block) | (block == 0)).tril()[None, None]
    embeddings = torch.randn(1, len(block), text.hidden_size, device=model.device, dtype=model.dtype).requires_grad_()
    attended = body._as_attended(mask.to(model.device), embeddings)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]], device=model.device)
    hidden = body.language_model(
        inputs_embeds=embeddings, attention_mask=attended, position_ids=positions, use_cache=False
    ).last_hidden_state
    (gradient,) = torch.autograd.grad(hidden[0, block == 2].float().square().sum(), embeddings)
    if gradient[0, block == 1].any():
        raise ValueError(
            f"independent_questions: in a language model of type {text.model_type!r} questions of one row would see "
            "each other, because not all of its layers are attention. Set it to 0"
        )


def batch_statistics(model: PanoramaVLM) -> list[str]:
    """In words, whether parts that train normalise by the micro-batch."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
    if not norms:
        return []
    return [
        f"{len(norms)} layers normalise by the statistics of a micro-batch (BatchNorm): what is learned depends on how "
        "a step is spread over micro-batches and processes."
    ]


def prepare(stage: Stage, model: PanoramaVLM) -> tuple[Any, Any]:
    """A model whose stage is set and its optimizer, spread over the processes."""
    accelerator, options = stage.accelerator, stage.options
    optimizer = make_optimizer(model, options)
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:
        batch = {"train_micro_batch_size_per_gpu": options.batch_size}
        batch["train_batch_size"] = options.batch_size * accelerator.num_processes
        deepspeed.deepspeed_config.update(batch, gradient_clipping=options.max_grad_norm)
    sharding = getattr(accelerator.state, "fsdp_plugin", None)
    if sharding is not None:
        set_up_sharding(sharding, model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if sharding is not None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(prepared, "generate")  # gathers weights as forward does
    return prepared, optimizer


def set_up_sharding(plugin: FullyShardedDataParallelPlugin, model: PanoramaVLM) -> None:
    """What the trainer needs of FSDP beside what the configuration says."""
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 would clip the gradients of each shard by its own norm: set fsdp_version to 2")
    if plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in model.modules()}  # SigLIP names a head it may not have
        plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules or [] if name in there]
    if plugin.mixed_precision_policy is not None:  # Accelerate would round losses and sums of gradients to bf16
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
    # Nothing here works in place on what the model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def checkpoint_activations(model: PanoramaVLM) -> None:
    """Recompute activations in backward, in frozen parts too: transformers does so in training mode only, which here is
    set for the layers themselves and not for what is in them, so that nothing is dropped out."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
