"""Moves a checkpoint of PanoLLaVA v1.0 over: `python -m panorama_vlm.train.convert OLD.ckpt NEW_FOLDER [options]`.

OLD is a Lightning checkpoint, a plain state dict or safetensors; no code in it is run. The vision tower and the
language model are those that its hyperparameters name on the Hub; `--vision`, `--language` and `--tokenizer` name
folders instead. Every tensor is carried over or listed with the reason why not; what the new model would lack is an
error, unless `--partial` says that this is wanted. `docs/v1.md` says what is the same afterwards and what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from ..composing_panorama import language_parts, public_name
from ..configuration_panorama import IMAGE_TOKEN
from ..geometry_panorama import VIEW_STRATEGIES
from ..modeling_panorama import PanoramaVLM
from ..options_panorama import MAX_TEXT_LENGTH, check_whole
from ..processing_panorama import IMAGE_MEAN, IMAGE_STD, PanoramaProcessor
from ..towers_panorama import new_tower, tower_of
from .card import write_model_card
from .checkpoint import save_adapters, whole_folder

State = dict[str, torch.Tensor]
SETTINGS = ("model_config.json", "panovlm_config.json")  # where v1.0 kept its options, beside a checkpoint
# How the parts of v1.0 are called in its several layouts; what stands behind a part's name stays.
_PARTS = {
    "vision_encoder": ("vision_encoder", "vision_backbone.encoder"),
    "vicreg_norm": ("vicreg_norm", "vision_backbone.norm"),
    "resampler": ("resampler", "resampler_module.resampler"),
    "vicreg_projector": ("vicreg_projector",),
    "vision_to_language_projection": ("vision_to_language_projection", "projector.linear"),
    "language_model": ("language_model",),
}
_WRAPPERS = re.compile(r"^(?:(?:model|module|_orig_mod)\.)+(?=(?:vi|re|pro|lang|text)[a-z_]*\.)")
_BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|original_inv_freq|num_batches_tracked)$")
_ADAPTER = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])\.(?P<name>\w+)\.weight$")
_ENDOFTEXT = "<|endoftext|>"


@dataclass
class Report:
    """What became of the tensors of a checkpoint.

    Args:
        carried: how many are in the new model.
        needless: name, shape and reason of those that the new model works without.
        unmapped: of those that it has no place for.
        missing: of those of the new model that begin with random weights.
        differences: in words, what else is not as it was.
    """

    carried: int = 0
    needless: list[tuple[str, list[int], str]] = field(default_factory=list)
    unmapped: list[tuple[str, list[int], str]] = field(default_factory=list)
    missing: list[tuple[str, list[int], str]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out that the model had, or would have."""
        return not self.unmapped and not self.missing

    def lines(self) -> list[str]:
        """All of it in words."""
        lines = [f"{self.carried} tensors are carried over."]
        for title, entries in (
            ("Not needed", self.needless),
            ("Not carried over", self.unmapped),
            ("New, with random weights", self.missing),
        ):
            lines += [f"{title}:"] * bool(entries)
            lines += [f"  {name} {shape}: {reason}" for name, shape, reason in entries]
        return lines + ["Different from v1.0:"] * bool(self.differences) + [f"  {each}" for each in self.differences]


def read_old(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any]]:
    """The weights of a checkpoint, in the names of v1.0 without what wraps them, and its hyperparameters.

    Args:
        path: a Lightning checkpoint, a state dict as `torch.save` writes it, or safetensors. Weights are mapped from
            the disk where the format allows it, so that the state of an optimizer costs no memory.

    Raises:
        ValueError: for a file that is not there, is damaged, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error) or "GLOBAL" in str(error) or "global" in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{str(path)!r} holds more than weights ({found.group(1) if found else 'objects of classes'}), and "
                "unpickling it could run code of whoever made it. Where you trust it, take the weights out where it "
                "came from: torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"
            ) from error
        raise ValueError(f"{str(path)!r} is truncated or no checkpoint: {_first_line(error)}") from error
    except Exception as error:  # of a damaged pickle whatever its reader stumbles over
        raise ValueError(f"{str(path)!r} is truncated or no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} must hold a checkpoint or a state dict, got a {type(content).__name__}")
    parts = {name: content.get(name) or {} for name in ("datamodule_hyper_parameters", "hyper_parameters")}
    parts["state_dict"] = state = content.get("state_dict", content)
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{name} of {str(path)!r} must be a dict, got a {type(part).__name__}")
    weights = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if unnamed := [name for name in weights if not isinstance(name, str)]:
        raise ValueError(f"the weights of {str(path)!r} must have names, got {unnamed[0]!r}")
    return weights, {**parts["datamodule_hyper_parameters"], **parts["hyper_parameters"]}


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    vision: str | None = None,
    language: str | None = None,
    tokenizer: str | None = None,
    settings: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    lora_alpha: float | None = None,
    keep_adapter: bool = False,
    projector_reads: str | None = None,
    partial: bool = False,
) -> Report:
    """Write the model of a v1.0 checkpoint into a folder that `from_pretrained` loads, with its processor and card.

    Args:
        checkpoint: see :func:`read_old`.
        folder: to make, whole or not there; nothing may be in it.
        vision, language, tokenizer: Hub ids or folders, for what the hyperparameters name. Of the two models the
            configuration is read, not the weights; the tokenizer is the language model's where it is not given.
        settings: a file of v1.0's options (JSON, flat or with its sections `models`, `image_processing`, `lora`, ...);
            `model_config.json` beside the checkpoint where it is not given. The checkpoint's hyperparameters go before.
        options: options of :class:`PanoramaConfig`, which go before what follows from the checkpoint.
        lora_alpha: of LoRA, where the checkpoint does not say.
        keep_adapter: also keep LoRA apart: `base` is the model without, `adapter` what peft loads onto it.
        projector_reads: `"tower"` or `"resampler"`, on whose tokens v1.0's VICReg projector stood; found where the two
            are of different width, and `"tower"` else, as in the layouts with `vision_encoder`.
        partial: whether a model that lacks something may be written.

    Raises:
        ValueError: for a folder that is not empty, a checkpoint that cannot be read or named parts that do not fit it,
            and, without `partial`, where something is not carried over.
    """
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ValueError(f"{str(folder)!r} is there already, and not an empty folder: name another")
    weights, found = read_old(checkpoint)
    old = _settings(found, settings, Path(checkpoint))
    report = Report()
    parts = _sort(weights, report)
    for name, state in (("vision_encoder", parts["vision_encoder"]), ("language_model", parts["language_model"])):
        if not state:
            raise ValueError(
                f"{str(checkpoint)!r} has no weights {name}.*: is it a checkpoint of PanoLLaVA v1.0? It has "
                f"{', '.join(sorted({name.split('.')[0] for name in weights})[:8]) or 'no tensors'}"
            )
    vision = _named("vision", vision or old.get("vision_name"))
    language = _named("language", language or old.get("language_model_name"))
    vision_config, text_config = _part_config("vision", vision), _part_config("language", language)
    new, chosen = _new_parts(parts, tower_of(vision_config).width(vision_config), projector_reads, report)
    adapters, plain = _split_lora(parts["language_model"], report)
    causal = _load("language model", AutoModelForCausalLM.from_config, text_config, plain, "language_model", report)
    tower = _load("vision tower", new_tower, vision_config, parts["vision_encoder"], "vision_encoder", report)
    words = _tokenizer(tokenizer or language, len(causal.get_input_embeddings().weight))
    given = {**_options(old, report), **chosen, **(options or {})}
    body, _ = language_parts(causal)
    prefix = next(name for name, module in causal.named_modules() if module is body)
    lora = _lora(adapters, prefix, old, lora_alpha, report)
    names = {"vision_name": public_name(vision), "language_model_name": public_name(language)}
    given = {**names, **given, **lora.options}
    model = PanoramaVLM.from_vision_text_pretrained(
        tower, causal, image_token_id=words.convert_tokens_to_ids(IMAGE_TOKEN), **given
    ).eval()
    _put(model, new, report)
    if not report.is_whole and not partial:
        raise ValueError(
            "the checkpoint cannot be carried over whole, and nothing was written; --partial writes the rest.\n"
            + "\n".join(report.lines())
        )
    processor = PanoramaProcessor.from_config(model.config, words, *_statistics(vision, old, report))
    with whole_folder(folder) as unfinished:
        if lora.weights:
            if keep_adapter:
                _save(model, processor, unfinished / "base", Path(checkpoint), report)
            model.requires_grad_(False)  # of the parts beside the adapters none is kept apart
            model.add_lora()
            result = model.load_state_dict(lora.weights, strict=False)
            if lacking := [name for name in result.missing_keys if "lora_" in name] + result.unexpected_keys:
                raise ValueError(f"the LoRA adapters do not fit the language model: {lacking[:3]}")
            if keep_adapter:
                save_adapters(model, unfinished / "adapter", str(unfinished / "base"), model.state_dict())
        _save(model, processor, unfinished, Path(checkpoint), report)
    return report


def _save(model: PanoramaVLM, processor: PanoramaProcessor, folder: Path, checkpoint: Path, report: Report) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    origin = [f"Converted from the PanoLLaVA v1.0 checkpoint `{checkpoint.name}` by `panorama_vlm.train.convert`."]
    origin += [f"- {each}" for each in report.differences]
    for title, entries in (("not carried over", report.unmapped), ("new, with random weights", report.missing)):
        origin += [f"- {title}: `{name}` {shape}, {reason}" for name, shape, reason in entries]
    write_model_card(folder, config=model.config, run={"origin": "\n".join([origin[0], "", *origin[1:]]).strip()})


# What the checkpoint says


def _settings(found: Mapping[str, Any], file: str | os.PathLike[str] | None, checkpoint: Path) -> dict[str, Any]:
    """v1.0's options by their latest names, from a checkpoint's hyperparameters and a file beside it."""
    path = Path(file) if file else next((p for n in SETTINGS if (p := checkpoint.with_name(n)).is_file()), None)
    said: dict[str, Any] = {}
    if path is not None:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} must be a JSON file of v1.0's options: {error}") from error
        if not isinstance(said, dict):
            raise ValueError(f"{str(path)!r} must be a JSON file of v1.0's options, and holds a {type(said).__name__}")
    flat: dict[str, Any] = {}
    for source in (said, found):
        for name, value in source.items():
            if name == "use_lora_cfg" and isinstance(value, Mapping):
                value = {"alpha": 32, **value}  # as v1.0 did where it was not said
            inside = isinstance(value, Mapping) and name in (
                "models",
                "image_processing",
                "data",
                "lora",
                "use_lora_cfg",
            )
            flat |= value if inside else {name: value}
    former = {"lm_name": "language_model_name", "lm_model": "language_model_name", "resampler": "resampler_type"}
    former |= {"vicreg_overlap_ratio": "overlap_ratio", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    for old, new in former.items():
        if flat.get(old) is not None:
            flat.setdefault(new, flat[old])
    return {name: value for name, value in flat.items() if value is not None}


def _options(old: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The options of the new configuration that follow from v1.0's, where it has any of them."""
    options: dict[str, Any] = {"token_selection": "all", "overlap_loss": "vicreg"}
    same: tuple[str, ...] = (
        "overlap_ratio",
        "fov_deg",
        "vicreg_loss_weight",
        "vicreg_similarity_weight",
        "vicreg_variance_weight",
    )
    same += ("vicreg_covariance_weight", "vicreg_gamma", "vicreg_mode", "system_prompt", "default_generation_prompt")
    options |= {name: old[name] for name in same if name in old}
    if not options.get("vicreg_loss_weight", 1.0):  # v1.0 wrote the 0 of its later stages
        del options["vicreg_loss_weight"]
    if isinstance(length := old.get("max_text_length"), int):
        options["max_text_length"] = max(check_whole("max_text_length", length, MAX_TEXT_LENGTH), MAX_TEXT_LENGTH)
    strategy = old.get("crop_strategy")
    if isinstance(strategy, str) and strategy in VIEW_STRATEGIES:
        options["view_strategy"] = strategy
        report.differences.append(f"views: {strategy} as it is here, which cuts other pixels than v1.0's of this name")
    else:
        said = f"crop_strategy {strategy!r} is not known here" if strategy else "the checkpoint names no crop_strategy"
        report.differences.append(f"views: {said}; they are those of `anyres_e2p` (option view_strategy)")
    size = old.get("image_size")
    size = size if isinstance(size, list | tuple) else [] if size is None else [size] * 2
    size = [check_whole("image_size of v1.0", side, 224) for side in size]
    if len(size) == 2 and size[0] == size[1]:
        options["image_size"] = size[0]
    elif size:
        report.differences.append(f"image_size: {list(size)} is no square; it is the vision tower's own")
    if old.get("use_projection_positional_encoding", True):
        options["position_encoding"] = "yaw"
        report.differences.append(
            "position code: sines of the yaw of each token's own ray; v1.0 added sines of columns counted over the "
            "views, and of rows"
        )
    else:
        options["position_encoding"] = "none"
    report.differences.append(
        "order of the visual tokens: view after view, each row by row; v1.0 laid rows, or what did not overlap of "
        "them, side by side over the views. CLS tokens are left out"
    )
    report.differences.append("<|vision|>: the placeholder is <image>, with its id where that was the next free one")
    return options


def _sort(weights: Mapping[str, torch.Tensor], report: Report) -> dict[str, State]:
    """The weights of each part of v1.0, by the names within the part."""
    parts: dict[str, State] = {part: {} for part in _PARTS}
    for full, value in weights.items():
        name = _WRAPPERS.sub("", full)
        found = next(
            (
                (part, name[len(old) + 1 :])
                for part, olds in _PARTS.items()
                for old in olds
                if name.startswith(f"{old}.")
            ),
            None,
        )
        shape = list(value.shape)
        if found is None:
            words = (
                "stage 2's layer on the words, which there is none of here"
                if name.startswith("text_projection.")
                else ""
            )
            report.unmapped.append((full, shape, words or "not known of PanoLLaVA v1.0"))
        elif _BUFFERS.search(name):
            report.needless.append((full, shape, "follows from the configuration"))
        elif (there := parts[found[0]].get(found[1])) is None:
            parts[found[0]][found[1]] = value
        elif there.shape == value.shape and torch.equal(there, value):
            report.needless.append((full, shape, f"the same tensor as that of {found[0]}"))
        else:
            report.unmapped.append((full, shape, f"{found[0]}.{found[1]} is there twice, with different values"))
    return parts


# What of it becomes what


def _new_parts(
    parts: Mapping[str, State], width: int, projector_reads: str | None, report: Report
) -> tuple[dict[str, tuple[str, torch.Tensor]], dict[str, Any]]:
    """The weights of resampler, projector and projection by their new names, each with its old one, and the options
    that give them a place.

    Args:
        width: of the vision tower.
    """
    new: dict[str, tuple[str, torch.Tensor]] = {}
    options: dict[str, Any] = {"projection_depth": 1}
    for name, value in parts["vision_to_language_projection"].items():
        options["latent_dimension"] = parts["vision_to_language_projection"]["weight"].shape[1]
        new[f"model.projection.layers.0.{name}"] = (f"vision_to_language_projection.{name}", value)
    layers, problem = _mlp(parts["resampler"])
    if problem is None:
        matrices = [value for value in layers.values() if value.ndim == 2]
        norms = ["inner"] * _has_norms(layers) + ["input"] * bool(parts["vicreg_norm"])
        options |= {
            "resampler_type": "mlp_v1",
            "resampler_depth": len(matrices),
            "resampler_hidden": matrices[0].shape[0] if len(matrices) > 1 else None,
            "resampler_norms": norms,
            "latent_dimension": matrices[-1].shape[0],
        }
        new |= {f"model.resampler.layers.{name}": (f"resampler.mlp.{name}", value) for name, value in layers.items()}
        new |= {f"model.resampler.before.{n}": (f"vicreg_norm.{n}", v) for n, v in parts["vicreg_norm"].items()}
        dropped = [n for n in parts["resampler"] if n.startswith("bn1.") and not _BUFFERS.search(n)]
        for name in dropped:
            reason = "folded into linear1, as it is in evaluation"
            report.needless.append((f"resampler.{name}", list(parts["resampler"][name].shape), reason))
    else:
        for part in ("resampler", "vicreg_norm"):
            report.unmapped += [(f"{part}.{name}", list(v.shape), problem) for name, v in parts[part].items()]
    _projector(parts["vicreg_projector"], width, options, projector_reads, new, report)
    return new, options


def _mlp(state: State) -> tuple[State, str | None]:
    """The layers of v1.0's MLP as a sequence, or why the resampler is none."""
    if "linear1.weight" in state and "linear2.weight" in state:
        layers = {f"{2 * i}.{kind}": state[f"linear{i + 1}.{kind}"] for i in (0, 1) for kind in ("weight", "bias")}
        if "bn1.weight" in state:  # Ioffe, Szegedy 2015, arXiv:1502.03167: in evaluation an affine map of each column
            scale = state["bn1.weight"] * (state["bn1.running_var"] + 1e-5).rsqrt()
            layers["0.weight"] = layers["0.weight"] * scale[:, None]
            layers["0.bias"] = (layers["0.bias"] - state["bn1.running_mean"]) * scale + state["bn1.bias"]
        return layers, None
    if not state:
        return {}, "there is none"
    if any(name.startswith(("bert.", "query")) for name in state):
        return {}, "v1.0's qformer, BERT with learned queries; here they lie on a grid, and the layers are BLIP-2's"
    if not all(name.startswith("mlp.") for name in state):
        return {}, "v1.0's bimamba has mixers of Mamba 1 (mamba-ssm), those here are Mamba 2's; or it is not known"
    layers = {name.removeprefix("mlp."): value for name, value in state.items()}
    numbers = sorted({int(name.split(".")[0]) for name in layers})
    step = 3 if _has_norms(layers) else 2
    expected = [number for number in range(numbers[-1] + 1) if number % step != step - 1]
    if numbers != expected:
        return {}, f"an MLP of layers {numbers}, where {expected} were expected"
    return layers, None


def _has_norms(layers: Mapping[str, torch.Tensor]) -> bool:
    return any(value.ndim == 1 and name.endswith("weight") for name, value in layers.items())


def _projector(
    state: State,
    width: int,
    options: dict[str, Any],
    reads: str | None,
    new: dict[str, tuple[str, torch.Tensor]],
    report: Report,
) -> None:
    """The VICReg projector: into `new` and `options`, or into the report."""
    if not state:
        return
    matrices = {int(n.split(".")[1]): v for n, v in state.items() if n.startswith("mlp.") and v.ndim == 2}
    first, last = matrices[min(matrices)], max(matrices)
    latent = options.get("latent_dimension")
    if reads is None:
        reads = "resampler" if first.shape[1] == latent != width else "tower"
    problem = None
    if reads == "tower":
        problem = (
            "v1.0's stood on the tower's tokens, here it stands on the resampler's (else --projector-reads resampler)"
        )
    elif first.shape[1] != latent:
        problem = f"it reads {first.shape[1]} dimensions, and the resampler gives {latent}"
    elif last and not _has_norms(state):
        problem = "without layer norms, which the one here has"
    if problem:
        report.unmapped += [(f"vicreg_projector.{name}", list(value.shape), problem) for name, value in state.items()]
        return
    options |= {
        "use_vicreg_projector": True,
        "vicreg_projector_dim": matrices[last].shape[0],
        "vicreg_projector_depth": len(matrices),
        "vicreg_projector_hidden": first.shape[0] if last else None,
    }
    for name, value in state.items():
        if name == f"mlp.{last}.bias":
            reason = "VICReg looks at differences and deviations, which a last bias does not change"
            report.needless.append((f"vicreg_projector.{name}", list(value.shape), reason))
        else:
            new[f"vicreg_projector.layers.{name.removeprefix('mlp.')}"] = (f"vicreg_projector.{name}", value)


def _put(model: PanoramaVLM, new: Mapping[str, tuple[str, torch.Tensor]], report: Report) -> None:
    """Put weights into the parts that are ours, and list what has no place or does not fit."""
    places = {
        n: p for n, p in model.named_parameters() if not n.startswith(("model.vision", "model.language", "lm_head"))
    }
    with torch.no_grad():
        for name, (old, value) in new.items():
            place = places.get(name)
            if place is None or place.shape != value.shape:
                there = "no such weights" if place is None else f"one of {list(place.shape)}"
                report.unmapped.append((old, list(value.shape), f"the new model has {there} as {name}"))
                continue
            place.copy_(value)
            report.carried += 1
            del places[name]
    report.missing += [(name, list(place.shape), "nothing in the checkpoint") for name, place in places.items()]


# Tower and language model


def _named(option: str, name: str | None) -> str:
    if name is None:
        raise ValueError(f"the checkpoint does not name its {option} model: give --{option} with a Hub id or a folder")
    return name


def _part_config(option: str, name: str) -> PretrainedConfig:
    """The configuration of the tower or the language model."""
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"{name!r} is no folder here and no repo that the Hub gives: name a folder with its config.json with "
            f"--{option} ({_first_line(error)})"
        ) from error
    half = getattr(config, "vision_config", None) if option == "vision" else config.get_text_config()
    return half if isinstance(half, PretrainedConfig) else config


def _load(what: str, make: Any, config: PretrainedConfig, state: State, part: str, report: Report) -> Any:
    """A model of a configuration with weights, by transformers itself, which knows what it has renamed since.

    Args:
        make: a model of a configuration, of the class that is wanted.
    """
    old = {name: list(value.shape) for name, value in state.items()}
    if what == "language model":
        table = next(
            (
                v
                for n, v in state.items()
                if n.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
            ),
            None,
        )
        if table is not None:  # v1.0 fitted it to its tokenizer
            config.vocab_size = len(table)
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing or unknown is in the report
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                kind = type(make(config))
            model, info = kind.from_pretrained(
                None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
            )
    except RuntimeError as error:
        raise ValueError(
            f"the weights of the {what} have not the shapes of its configuration ({config.model_type}): another model "
            f"was named than the checkpoint was trained with. {str(error).strip()[-300:]}"
        ) from error
    finally:
        logging.set_verbosity(level)
    for name in sorted(info["unexpected_keys"]):
        report.unmapped.append((f"{part}.{name}", old.get(name, []), f"a {type(model).__name__} has none"))
    for name in sorted(info["missing_keys"]):
        shape = list(model.get_parameter_or_buffer(name).shape)
        report.missing.append((f"{part}.{name}", shape, "nothing in the checkpoint"))
    report.carried += len(state) - len(info["unexpected_keys"])
    return model.eval()


def _tokenizer(name: str | None, rows: int) -> Any:
    """The tokenizer, with the tokens that v1.0 added; `<image>` takes the place of its `<|vision|>`.

    Args:
        rows: of the table of embeddings, which v1.0 fitted to its tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} holds no tokenizer that can be read: name a folder with --tokenizer ({_first_line(error)})"
        ) from error
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.eos_token != _ENDOFTEXT and len(tokenizer) < rows:
        tokenizer.add_tokens([_ENDOFTEXT], special_tokens=True)
    return tokenizer


def _statistics(name: str, old: Mapping[str, Any], report: Report) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels."""
    if old.get("image_mean") and old.get("image_std"):
        return old["image_mean"], old["image_std"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mean, std = PanoramaProcessor.image_statistics(name)
    where = "SigLIP's" if said else "the vision tower's"
    report.differences.append(f"image_mean and image_std: the checkpoint does not say them; they are {where}")
    return (mean, std) if mean else (IMAGE_MEAN, IMAGE_STD)


# LoRA


@dataclass
class _Lora:
    weights: State = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def _split_lora(state: State, report: Report) -> tuple[dict[str, torch.Tensor], State]:
    """The adapters of a language model, and its own weights by the names that they have without peft."""
    adapters, plain = {}, {}
    for name, value in state.items():
        bare = name.removeprefix("base_model.model.") if name.startswith("base_model.model.") else name
        if "lora_" in bare:
            adapters[bare] = value
        else:
            plain[bare.replace(".base_layer.", ".")] = value
    return adapters, plain


def _lora(
    adapters: Mapping[str, torch.Tensor], prefix: str, old: Mapping[str, Any], alpha: float | None, report: Report
) -> _Lora:
    """LoRA by our names and as our options; what does not fit goes into the report.

    Args:
        prefix: the name of the language model's body in the model with a head.
    """
    lora = _Lora()
    ranks, targets, names = set(), set(), set()
    for name, value in adapters.items():
        match = _ADAPTER.match(name)
        if match is None or not name.startswith(f"{prefix}."):
            reason = "LoRA on the head" if match else "not plain LoRA (of DoRA, embeddings or biases)"
            report.unmapped.append(
                (f"language_model.{name}", list(value.shape), f"{reason}, which there is none of here")
            )
            continue
        ranks.add(value.shape[0 if match["factor"] == "A" else 1])
        targets.add(match["layer"].split(".")[-1])
        names.add(match["name"])
        layer = match["layer"].removeprefix(f"{prefix}.")
        key = f"model.language_model.base_model.model.{layer}.lora_{match['factor']}.default.weight"
        lora.weights[key] = value
    if not lora.weights:
        return lora
    if len(ranks) > 1 or len(names) > 1:
        raise ValueError(f"LoRA must be one adapter of one rank, got the ranks {sorted(ranks)} of {sorted(names)}")
    alpha = alpha if alpha is not None else old.get("lora_alpha")
    if alpha is None:
        raise ValueError("the checkpoint holds LoRA and does not say its alpha: give --lora-alpha (v1.0 used 32)")
    lora.options = {"lora_rank": ranks.pop(), "lora_alpha": alpha, "lora_target_modules": sorted(targets)}
    if "lora_dropout" in old:
        lora.options["lora_dropout"] = old["lora_dropout"]
    report.carried += len(lora.weights)
    return lora


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.train.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="Lightning .ckpt, state dict or .safetensors of PanoLLaVA v1.0")
    parser.add_argument("folder", help="folder to make")
    parser.add_argument("--vision", help="Hub id or folder of the vision tower; its config.json is enough")
    parser.add_argument(
        "--language", help="Hub id or folder of the language model; config.json and tokenizer are enough"
    )
    parser.add_argument("--tokenizer", help="Hub id or folder of the tokenizer, where it is not in --language")
    parser.add_argument(
        "--settings", help="JSON file of v1.0's options (default: model_config.json beside the checkpoint)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of PanoramaConfig, as YAML"
    )
    parser.add_argument("--lora-alpha", type=float, help="alpha of LoRA, where the checkpoint does not say")
    parser.add_argument("--keep-adapter", action="store_true", help="also keep LoRA apart, in adapter/ on base/")
    parser.add_argument(
        "--projector-reads", choices=["tower", "resampler"], help="whose tokens the VICReg projector read"
    )
    parser.add_argument("--partial", action="store_true", help="write a model that lacks what cannot be carried over")
    given = vars(parser.parse_args(arguments))
    logging.disable_progress_bar()
    try:
        for option in given["option"]:
            if "=" not in option:
                raise ValueError(f"--option must be NAME=VALUE, got {option!r}")
        given["options"] = OmegaConf.to_container(OmegaConf.from_dotlist(given.pop("option")))
        report = convert(given.pop("checkpoint"), folder := given.pop("folder"), **given)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join([*report.lines(), f"Saved {folder}."]))


if __name__ == "__main__":
    main()
