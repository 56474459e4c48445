"""Loading what training writes: a checkpoint, a saved folder, or LoRA adapters; and writing folders that are whole."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from .modeling_panorama import PanoramaVLM

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # written last into a training checkpoint, with the size of every other file
ADAPTER = "adapter_config.json"  # as peft names it
OTHER_PARTS = "trained_parts.safetensors"  # beside the adapters: what the stage trained outside the language model
_UNFINISHED = ".unfinished-"


@contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends: after a crash there is all of it or nothing.

    Every file is on the disk before the folder is renamed. A `folder` that is there already is replaced.
    """
    folder = Path(folder)
    unfinished = folder.with_name(_UNFINISHED + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    commit_folder(unfinished, folder)


def commit_folder(unfinished: Path, folder: Path) -> None:
    """Make a written folder durable under its final name."""
    for path in [*unfinished.rglob("*"), unfinished]:
        _sync(path)
    if folder.exists():
        old = folder.with_name(f"{_UNFINISHED}old-{folder.name}")
        os.replace(folder, old)
        os.replace(unfinished, folder)
        shutil.rmtree(old)
    else:
        os.replace(unfinished, folder)
    _sync(folder.parent)


def unfinished_folder(folder: Path) -> Path:
    """Where the content of `folder` is written before :func:`commit_folder`."""
    return folder.with_name(_UNFINISHED + folder.name)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """The last file of a training checkpoint: `state`, and how large the others are."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / STATE).write_text(json.dumps({**state, "files": files}, indent=1), encoding="utf-8")


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a training checkpoint.

    Raises:
        ValueError: for a checkpoint that is not whole; what is missing is named.
    """
    try:
        state: dict[str, Any] = json.loads(Path(folder, STATE).read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (there := Path(folder, name).stat().st_size) != size:
                raise ValueError(f"{name} has {there} bytes instead of {size}")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint {str(folder)!r} is not whole: {error}") from error
    return state


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; those that are torn are ignored with a warning."""
    for torn in folder.glob(f"{_UNFINISHED}*"):
        logger.warning("Ignoring %s: it was not finished when the run was stopped.", torn)
    whole = []
    for path in folder.glob("*/"):
        if path.name.startswith(_UNFINISHED):
            continue
        try:
            whole.append((read_state(path)["total_steps"], path))
        except ValueError as error:
            logger.warning("Ignoring %s: %s", path, error)
    return max(whole)[1] if whole else None


def save_adapters(model: "PanoramaVLM", folder: Path, base: str | None, state_dict: dict[str, torch.Tensor]) -> None:
    """Write the LoRA adapters as peft writes them, and beside them what else was trained.

    Args:
        model: with adapters.
        folder: to write into.
        base: what the adapters belong to; `from_checkpoint` loads it.
        state_dict: of the model.
    """
    adapters = model.language_model
    adapters.peft_config["default"].base_model_name_or_path = base
    own = {name.removeprefix("language_model."): value for name, value in state_dict.items() if "lora_" in name}
    adapters.save_pretrained(folder, state_dict=own)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    save_file({name: state_dict[name].contiguous().cpu() for name in trains}, folder / OTHER_PARTS)


def load_checkpoint(
    cls: "type[PanoramaVLM]", path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
) -> "PanoramaVLM":
    """See :meth:`PanoramaVLM.from_checkpoint`."""
    path = Path(path)
    if (path / ADAPTER).is_file():
        base = base or json.loads((path / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"the adapters in {str(path)!r} do not say what they belong to: give base=FOLDER")
        logger.info("%s holds LoRA adapters; loading what they belong to from %s.", path, base)
        model = cls.from_pretrained(base, **kwargs)
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError("LoRA adapters need peft: pip install peft") from error
        model.language_model = PeftModel.from_pretrained(model.language_model, str(path))
        others = load_file(path / OTHER_PARTS) if (path / OTHER_PARTS).is_file() else {}
        unexpected = model.load_state_dict(others, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{path / OTHER_PARTS} has weights the model does not know: {sorted(unexpected)[:3]}")
        logger.info("Loaded the adapters and %d other tensors.", len(others))
        return model
    if (path / STATE).is_file():
        state = read_state(path)
        logger.info("%s is a training checkpoint: stage %s, step %d.", path, state["stage"], state["step"])
        if not (path / "model.safetensors").is_file():
            raise ValueError(
                f"the checkpoint {str(path)!r} holds the weights in the shards of FSDP or DeepSpeed; it can be "
                "resumed, and the folder of the finished stage can be loaded"
            )
        config = cls.config_class.from_pretrained(path)
        weights = load_file(path / "model.safetensors")
        model = cls(config)
        if any("lora_" in name for name in weights):
            model.add_lora()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        model.tie_weights()
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        missing = [name for name in missing if name not in tied and not _is_tied_head(model, name)]
        if missing or unexpected:
            raise ValueError(
                f"the weights in {str(path)!r} do not fit: missing {missing[:3]}, unknown {unexpected[:3]}"
            )
        logger.info("Loaded %d tensors%s.", len(weights), ", LoRA adapters among them" if model.has_lora else "")
        return model.to(kwargs.get("dtype", torch.float32)).eval()
    if (path / "config.json").is_file():
        logger.info("%s is a saved folder.", path)
        return cls.from_pretrained(path, **kwargs)
    found = sorted(each.name for each in path.iterdir()) if path.is_dir() else "no such folder"
    raise ValueError(
        f"{str(path)!r} is no training checkpoint ({STATE}), saved folder (config.json) or PEFT adapter folder "
        f"({ADAPTER}): {found}"
    )


def _is_tied_head(model: "PanoramaVLM", name: str) -> bool:
    """Whether a missing weight is the head's, tied to the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
    return head is not None and parameter is embeddings.weight and head.weight is embeddings.weight


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
