"""Loading: a folder is loaded whole or not at all, and whatever training wrote is known for what it is."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import is_flash_attn_2_available

from .stages_panorama import StagesMixin

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # written last into a training checkpoint, with the size of every other file
ADAPTER = "adapter_config.json"  # as peft names it
OTHER_PARTS = "trained_parts.safetensors"  # beside the adapters: what the stage trained outside the language model
# What a quantiser leaves out: names as they are in PanoramaModel and in PanoramaVLM.
_PARTS = ("vision_tower", "resampler", "projection")
WHOLE_PARTS = (*_PARTS, *(f"model.{part}" for part in _PARTS), "vicreg_projector", "lm_head")
# What from_pretrained of a configuration has to know to find it.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def choose_attention(device: str | int | torch.device | None, dtype: torch.dtype | None) -> str:
    """The attention implementation for models on a device: the one place where this is decided.

    Flash attention 2 where it is installed, the device is a CUDA device and the precision half; else SDPA.
    `DISABLE_FLASH_ATTN=1` forbids flash attention.

    Args:
        device: where the model will run, as `torch.device` takes it.
        dtype: the precision it computes in.
    """
    on_cuda = device is not None and torch.device(device).type == "cuda"
    if not (on_cuda and dtype in (torch.float16, torch.bfloat16)):
        return "sdpa"
    if os.environ.get("DISABLE_FLASH_ATTN") == "1":
        logger.info("DISABLE_FLASH_ATTN=1: using SDPA.")
        return "sdpa"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    logger.info("Using SDPA. For flash attention 2: pip install flash-attn --no-build-isolation")
    return "sdpa"


class CheckedLoading:
    """`from_pretrained` that chooses the attention and refuses weights that do not fit; mixed into the models."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`. Where `device_map` names a CUDA device, `dtype` (that of the saved
        weights where it is not given) is half and `attn_implementation` is not given, :func:`choose_attention` decides.

        Where a `quantization_config` does not say what it leaves out, only the language model is quantised
        (:func:`quantized_alone`).

        Weights are read from safetensors alone; `use_safetensors=False` reads a pickle of tensors, as transformers does
        (with `weights_only`).

        Raises:
            OSError: for a folder without safetensors.
            ValueError: for a folder that lacks weights of the model, or has some that it does not know: with random
                weights in their place it would answer nonsense.
        """
        kwargs.setdefault("use_safetensors", True)
        if "attn_implementation" not in kwargs and (device := _cuda_device(kwargs.get("device_map"))) is not None:
            dtype = _dtype_to_load(cls, pretrained_model_name_or_path, kwargs)
            if (choice := choose_attention(device, dtype)) != "sdpa":  # SDPA is the default where it is supported
                kwargs["attn_implementation"] = choice
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantized_alone(kwargs["quantization_config"])
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        _check_loaded(model, info, pretrained_model_name_or_path)
        if isinstance(model, StagesMixin):  # loading makes new parameters
            model.freeze_unused()
        return (model, info) if output_loading_info else model


def quantized_alone(config: Any) -> Any:
    """A `quantization_config` that leaves tower, resampler, projection and heads whole, where it does not say itself
    what it leaves out (`modules_to_not_convert`, or `llm_int8_skip_modules` of bitsandbytes): they are small, and what
    they lose every token of the language model sees. What was given stays as it is.

    Args:
        config: a quantisation config of transformers, or the dict of one.
    """
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, name) and getattr(config, name) is None:
            config = copy.copy(config)
            setattr(config, name, [*WHOLE_PARTS])
            break
    return config


def _cuda_device(device_map: Any) -> str | int | torch.device | None:
    """The one CUDA device that a `device_map` names."""
    if isinstance(device_map, dict) and len(set(device_map.values())) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int | torch.device):
        device = torch.device(device_map)
    elif isinstance(device_map, str) and device_map.startswith("cuda"):
        device = torch.device(device_map)
    else:
        return None
    return device if device.type == "cuda" else None


def _dtype_to_load(cls: Any, path: Any, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The precision that `from_pretrained` will give: as asked for, else as saved."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if dtype is None or dtype == "auto":
        config = kwargs.get("config")
        if config is None:
            hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            config = cls.config_class.from_pretrained(path, **hub)
        dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _check_loaded(model: Any, info: dict[str, Any], path: Any) -> None:
    """Raise for missing and unknown weights; what a quantiser keeps beside its weights is its own business."""
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if getattr(model, "hf_quantizer", None) is not None:
        leaves = {name for name, module in model.named_modules() if not any(module.children())}
        known = leaves | {name for name, _ in model.named_parameters()}
        unknown = [name for name in unknown if not known & {name.rsplit(".", depth)[0] for depth in (1, 2, 3)}]
        missing = []
    if missing or unknown:
        problems = [
            f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
            for what, names in (("missing", missing), ("not known", unknown))
            if names
        ]
        raise ValueError(
            f"the weights in {str(path)!r} do not fit {type(model).__name__} as its configuration describes it; "
            f"{'; '.join(problems)}. Load it with the options and the version that it was saved with"
        )


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds what a disk or a copy has damaged."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def read_state(folder: str | os.PathLike[str], whole: Sequence[str] | None = ()) -> dict[str, Any]:
    """The state of a training checkpoint.

    Args:
        folder: of the checkpoint.
        whole: the files of which the content is checked, not only the size; `None` for all.

    Raises:
        ValueError: for a checkpoint that is not whole; what is missing or damaged is named.
    """
    try:
        state: dict[str, Any] = json.loads(Path(folder, STATE).read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (there := Path(folder, name).stat().st_size) != size:
                raise ValueError(f"{name} has {there} bytes instead of {size}")
            known = state.get("checksums", {}).get(name)
            if known is not None and (whole is None or name in whole) and checksum(Path(folder, name)) != known:
                raise ValueError(f"{name} is damaged: its content is not what was written")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint {str(folder)!r} is not whole: {error}") from error
    return state


def load_checkpoint(
    cls: Any, path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
) -> Any:
    """See :meth:`PanoramaVLM.from_checkpoint`."""
    path = Path(path)
    if (path / ADAPTER).is_file():
        return _load_adapters(cls, path, base, **kwargs)
    if (path / STATE).is_file():
        state = read_state(path, whole=["model.safetensors"])
        logger.info("%s is a training checkpoint: stage %s, step %d.", path, state["stage"], state["step"])
        return _load_training_checkpoint(cls, path, **kwargs)
    if (path / "config.json").is_file():
        logger.info("%s is a saved folder.", path)
        return cls.from_pretrained(path, **kwargs)
    found = sorted(each.name for each in path.iterdir()) if path.is_dir() else "no such folder"
    raise ValueError(
        f"{str(path)!r} is no training checkpoint ({STATE}), saved folder (config.json) or PEFT adapter folder "
        f"({ADAPTER}): {found}"
    )


def _load_adapters(cls: Any, path: Path, base: str | os.PathLike[str] | None, **kwargs: Any) -> Any:
    """A folder of LoRA adapters, with what they belong to."""
    if base is None:
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        base = path / base if base and (path / base).is_dir() else base
    if not base:
        raise ValueError(f"the adapters in {str(path)!r} do not say what they belong to: give base=FOLDER")
    logger.info("%s holds LoRA adapters; loading what they belong to from %s.", path, base)
    model = cls.from_pretrained(base, **kwargs)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("LoRA adapters need peft: pip install peft") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # peft goes on with random ones
        try:
            model.model.language_model = PeftModel.from_pretrained(model.model.language_model, str(path))
        except UserWarning as error:
            raise ValueError(f"the adapters in {str(path)!r} do not fit the language model: {error}") from error
    others = load_file(path / OTHER_PARTS) if (path / OTHER_PARTS).is_file() else {}
    unexpected = model.load_state_dict(others, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path / OTHER_PARTS} has weights the model does not know: {sorted(unexpected)[:3]}")
    logger.info("Loaded the adapters and %d other tensors.", len(others))
    return model


def _load_training_checkpoint(cls: Any, path: Path, **kwargs: Any) -> Any:
    """A checkpoint of one machine or DDP. Its LoRA adapters, where it has some, are put on the model."""
    if not (path / "model.safetensors").is_file():
        raise ValueError(
            f"the checkpoint {str(path)!r} holds the weights in the shards of FSDP or DeepSpeed; it can be "
            "resumed, and the folder of the finished stage can be loaded"
        )
    weights = load_file(path / "model.safetensors")
    adapters = {name: weights.pop(name) for name in [*weights] if "lora_" in name}
    if not adapters:
        return cls.from_pretrained(path, **kwargs)
    plain = {re.sub(r"\.base_model\.model\.|\.base_layer\.", ".", name): weight for name, weight in weights.items()}
    config = kwargs.pop("config", None) or cls.config_class.from_pretrained(path)
    model = cls.from_pretrained(None, config=config, state_dict=plain, **kwargs)
    model.add_lora()
    result = model.load_state_dict(adapters, strict=False)
    if lacking := [name for name in result.missing_keys if "lora_" in name] + result.unexpected_keys:
        raise ValueError(f"the adapters in {str(path)!r} do not fit lora_rank={config.lora_rank}: {lacking[:3]}")
    logger.info("Loaded %d tensors of the model and %d of LoRA adapters.", len(plain), len(adapters))
    return model.eval()
