"""Options of a training run: a YAML file, and what the command line says otherwise."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..configuration_panorama import PanoramaConfig
from ..data.augmentation import Augmentation
from ..data.files import package_path
from ..data.sources import DataSource
from ..geometry_panorama import ViewOptions
from ..options_panorama import check_whole
from ..stages_panorama import PARTS, STAGES

CONFIGS = Path(__file__).with_name("configs")
STABLE = "warmup_stable_decay"
DECAY_RATIO = 0.3
# Those of transformers that need nothing else: no least rate, no metric.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"),
    STABLE,
)


def _option(default: Any, help: str) -> Any:
    make = {"default_factory": lambda: default} if isinstance(default, dict | list) else {"default": default}
    return field(**make, metadata={"help": help})


@dataclass
class StageConfig:
    """How one stage is trained."""

    epochs: float = _option(1.0, "passes over the data, where max_steps does not say how long")
    max_steps: int | None = _option(None, "optimizer steps; a stream needs it")
    batch_size: int = _option(4, "samples a process and micro-batch")
    accumulation: int = _option(1, "micro-batches an optimizer step")
    learning_rate: float = _option(2e-4, "peak of the schedule")
    learning_rates: dict[str, float] = _option({}, f"peaks for parts of the model, of {', '.join(PARTS)}")
    optimizer: Literal["adamw", "muon"] = _option(
        "adamw",
        "muon: torch's Muon for the hidden matrices, at AdamW's rates, and AdamW for vectors, embeddings, heads, "
        "convolutions and LoRA; not with DeepSpeed",
    )
    weight_decay: float = _option(0.01, "of matrices")
    warmup_ratio: float = _option(0.03, "share of the steps in which the learning rate rises")
    schedule: str = _option("cosine", f"of the learning rate, by transformers.get_scheduler: {', '.join(SCHEDULES)}")
    decay_ratio: float | None = _option(
        None,
        f"share of the steps, the last ones, in which the learning rate of {STABLE} falls in a line to 0; only with "
        f"that schedule, and {DECAY_RATIO} where it is not given",
    )
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    label_loss_weight: float = _option(
        0.0, "weight of the loss that teaches each token what its direction shows, where data say it; 1 is usual"
    )
    independent_questions: float = _option(
        0.0,
        "share of the samples, in [0, 1], whose questions are taught each by itself, in one row in which they do not "
        "see each other; the others are one conversation. Not for stage vision",
    )
    further_view: float = _option(
        0.0,
        "share of the samples, in [0, 1], that see one further, narrower view, half of them of a place that they name; "
        "not in stage vision",
    )
    turn: float = _option(
        0.0,
        "share of the samples, in [0, 1], that are turned to another heading, with their answers, where data say what "
        "turning does to them (column turns). In stage vision random_heading turns",
    )
    mirror: float = _option(
        0.0,
        "share of the samples, in [0, 1], whose left and right are exchanged, with their questions and answers, where "
        "data say how (column mirrors); in stage vision all of them may be",
    )
    tilt: float = _option(
        0.0,
        "share of the samples, in [0, 1], that a camera took which was not level, with the questions that this does "
        "not change (column tilts); in stage vision all of them may be, and token labels are not known then",
    )
    tilt_deg: float = _option(5.0, "by so many degrees at most, in (0, 45]")
    data: list[DataSource] = _option([], "the stage's own data; without it that of the run")

    @property
    def augmentation(self) -> Augmentation:
        """Which samples are shown otherwise."""
        return Augmentation(self.turn, self.mirror, self.tilt, self.tilt_deg)


@dataclass
class ComposeConfig:
    """A new model from two others, or from a pretrained vision-language model."""

    vision: Any = _option(None, "Hub id or folder of a vision tower, or its configuration (random weights)")
    language: Any = _option(None, "Hub id or folder of a causal language model, or its configuration (random weights)")
    vision_kwargs: dict[str, Any] = _option({}, "for its from_pretrained")
    language_kwargs: dict[str, Any] = _option({}, "for its from_pretrained, such as gguf_file")
    tokenizer: str | None = _option(None, "Hub id or folder; `bytes` for one token a byte. Else the language model's")
    vlm: str | None = _option(None, "Hub id or folder of a whole vision-language model, instead of the two")
    vlm_kwargs: dict[str, Any] = _option({}, "for its from_pretrained")


@dataclass
class TrainConfig:
    """A run of one stage, or of all three in order, each from the one before."""

    output: str = _option("output", "folder for checkpoints, logs and a folder of each trained stage")
    stage: Literal["all", "vision", "resampler", "finetune"] = _option("all", "which stage to train")
    model: str | None = _option(
        None,
        "folder or Hub id to start from, also of a vision-language model, as compose.vlm; without it `compose` makes a "
        "new one",
    )
    compose: ComposeConfig = field(default_factory=ComposeConfig, metadata={"help": "a new model"})
    options: dict[str, Any] = _option({}, "options of PanoramaConfig, such as overlap_ratio")
    data: list[DataSource] = _option([], "what is mixed; on the command line also one path")
    validation_share: float = _option(0.0, "share of the panoramas kept for validation, in [0, 1)")
    vision: StageConfig = field(default_factory=StageConfig, metadata={"help": "stage 1"})
    resampler: StageConfig = field(default_factory=StageConfig, metadata={"help": "stage 2"})
    finetune: StageConfig = field(default_factory=StageConfig, metadata={"help": "stage 3"})
    seed: int = _option(0, "of weights, order and augmentation")
    random_heading: bool = _option(True, "turn panoramas to random headings in stage vision")
    group_by_length: bool = _option(False, "let the samples of a step be of similar length")
    num_workers: int = _option(1, "processes that read and cut panoramas")
    cache_dir: str | None = _option(
        None,
        "keeps prepared views for later epochs; headings are then multiples of 45 degrees, not 1",
    )
    max_bad_share: float = _option(0.1, "the run fails when more samples than this share cannot be used")
    max_skipped_steps: int = _option(
        0,
        "steps in a row that are skipped because the loss or the gradient is not finite: nothing changes but the data, "
        "which goes on. One more ends the run; 0: the first does. Not with DeepSpeed",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = _option(
        "auto",
        "how attention is computed; auto: flash attention where it can be, else sdpa. On CPUs in bf16 eager is fast",
    )
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass: less memory, more time")
    resume: str = _option("auto", "auto: from the newest whole checkpoint in output; never; or a checkpoint")
    save_every: int = _option(500, "steps between two checkpoints; there is one at the end of a stage, too")
    keep_checkpoints: int = _option(3, "the newest ones that are kept, beside the one with the lowest evaluation loss")
    log_every: int = _option(10, "steps between two lines of metrics.jsonl and of the trackers")
    eval_every: int = _option(500, "steps between two evaluations on the validation share, and sample answers")
    eval_samples: int = _option(4, "sample answers an evaluation")
    eval_batches: int = _option(16, "micro-batches a process and evaluation, where validation data is a stream")
    trackers: list[str] = _option(["tensorboard"], "of Accelerate: tensorboard, trackio, wandb, ...")
    project: str = _option("panorama-vlm", "name of the project in the trackers")
    push_to_hub: str | None = _option(None, "repo to push to, as org/name")
    hub_private: bool = _option(False, "make it private")
    hub_every: int = _option(0, "also push at every n-th checkpoint; 0: only at the end")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages to train, in order."""
        return STAGES if self.stage == "all" else (self.stage,)

    def stage_config(self, stage: str) -> StageConfig:
        """The options of a stage."""
        return {"vision": self.vision, "resampler": self.resampler, "finetune": self.finetune}[stage]

    def check(self) -> None:
        """Raise `ValueError` for what is wrong, before anything is loaded."""
        for stage in self.stages:
            options = self.stage_config(stage)
            for name in ("batch_size", "accumulation", "learning_rate", "max_grad_norm"):
                _require(getattr(options, name) > 0, f"{stage}.{name}", getattr(options, name), "positive")
            _require(options.weight_decay >= 0, f"{stage}.weight_decay", options.weight_decay, "at least 0")
            weight, share = options.label_loss_weight, options.independent_questions
            _require(weight >= 0, f"{stage}.label_loss_weight", weight, "at least 0")
            _require(0 <= share <= 1, f"{stage}.independent_questions", share, "in [0, 1]")
            _require(0 <= options.further_view <= 1, f"{stage}.further_view", options.further_view, "in [0, 1]")
            _require(not options.further_view or stage != "vision", f"{stage}.further_view", options.further_view, "0")
            for name in ("turn", "mirror", "tilt"):
                _require(0 <= getattr(options, name) <= 1, f"{stage}.{name}", getattr(options, name), "in [0, 1]")
            _require(not options.turn or stage != "vision", f"{stage}.turn", options.turn, "0: random_heading turns")
            _require(0 < options.tilt_deg <= 45, f"{stage}.tilt_deg", options.tilt_deg, "in (0, 45]")
            _require(
                not share or self.attention != "flash_attention_2",
                f"{stage}.independent_questions",
                share,
                "0 with flash_attention_2, which takes no mask of this kind",
            )
            _require(
                not share or stage != "vision", f"{stage}.independent_questions", share, "0: stage vision asks nothing"
            )
            _require(0 <= options.warmup_ratio < 1, f"{stage}.warmup_ratio", options.warmup_ratio, "in [0, 1)")
            _require(
                options.schedule in SCHEDULES, f"{stage}.schedule", options.schedule, f"one of {', '.join(SCHEDULES)}"
            )
            if (decay := options.decay_ratio) is not None:
                _require(
                    options.schedule == STABLE, f"{stage}.schedule", options.schedule, f"{STABLE} with decay_ratio"
                )
                _require(0 < decay <= 1, f"{stage}.decay_ratio", decay, "in (0, 1]")
            if options.schedule == STABLE:
                share = options.warmup_ratio + (DECAY_RATIO if decay is None else decay)
                _require(share <= 1, f"{stage}.warmup_ratio + {stage}.decay_ratio", share, "at most 1")
            _require(
                options.epochs > 0 if options.max_steps is None else options.max_steps > 0,
                f"{stage}.epochs and {stage}.max_steps",
                f"{options.epochs} and {options.max_steps}",
                "positive",
            )
            for name in ("learning_rate", "weight_decay", "label_loss_weight"):
                _require(math.isfinite(getattr(options, name)), f"{stage}.{name}", getattr(options, name), "finite")
            for group, rate in options.learning_rates.items():
                _require(group in PARTS, f"a key of {stage}.learning_rates", group, f"one of {', '.join(PARTS)}")
                is_rate = isinstance(rate, int | float) and 0 <= rate < math.inf
                _require(is_rate, f"{stage}.learning_rates.{group}", rate, "a number of at least 0")
            if not (options.data or self.data):
                raise ValueError(f"stage {stage!r} has no data: name some with --data PATH or in the YAML file")
        for name in ("save_every", "log_every", "eval_every", "eval_batches", "keep_checkpoints"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        check_whole("max_skipped_steps", self.max_skipped_steps, typical=3, least=0)
        for name in ("num_workers", "eval_samples", "hub_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("validation_share", "max_bad_share"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        made = self.compose.vision is not None, self.compose.language is not None
        whole = self.compose.vlm is not None
        if self.model is None and not whole and not all(made):
            raise ValueError("give --model, compose.vlm, or both compose.vision and compose.language to make a new one")
        if self.model is not None and (whole or any(made)):
            raise ValueError("compose makes a new model: leave it out with --model, or --model")
        if whole and (any(made) or self.compose.tokenizer is not None):
            raise ValueError(
                "compose.vlm is a whole model, with its tower, language model and tokenizer: leave out compose.vision, "
                "compose.language and compose.tokenizer, or compose.vlm"
            )


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def load_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that a command line names.

    Args:
        arguments: `[CONFIG.yaml] [--option value ...]`. The file is a path or the name of a ready one, `option` a
            dotted name such as `finetune.learning_rate` (hyphens stand for underscores), `value` YAML. An option
            without a value is true.

    Raises:
        ValueError: for an unknown option, with a suggestion, or a value of the wrong type.
    """
    arguments = list(arguments)
    parts = [OmegaConf.structured(TrainConfig)]
    where = "the command line"
    try:
        if arguments and not arguments[0].startswith("--"):
            file = where = arguments.pop(0)
            found = next((path for path in (Path(file), CONFIGS / file) if path.is_file()), None)
            if found is None:
                ready = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
                raise ValueError(f"there is no file {file!r}; ready ones are {ready}")
            parts.append(OmegaConf.merge(*parts, OmegaConf.load(found)))
            where = "the command line"
        merged = OmegaConf.merge(*parts, OmegaConf.from_dotlist(_dotlist(arguments)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"in {where}: {name}{str(error).splitlines()[0]}") from error
    except (YAMLError, UnicodeDecodeError, TypeError) as error:  # OmegaConf says nothing of its own
        raise ValueError(f"in {where}: {' '.join(str(error).split())}") from error
    assert isinstance(config, TrainConfig)
    for name in ("output", "cache_dir", "model", "resume"):  # in a file no shell expands ~
        if isinstance(value := getattr(config, name), str):
            setattr(config, name, os.path.expanduser(value))
    config.data = [_resolve(source) for source in config.data]
    for stage in STAGES:
        options = config.stage_config(stage)
        options.data = [_resolve(source) for source in options.data]
    for part in ("vision", "language", "tokenizer", "vlm"):
        if isinstance(value := getattr(config.compose, part), str):
            setattr(config.compose, part, package_path(value))
    config.check()
    return config


def save_config(config: TrainConfig, path: Path) -> None:
    """Write every option, so that the run can be repeated with this file alone."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def describe() -> str:
    """Every option with its default and what it does."""
    lines = ["usage: accelerate launch -m panorama_vlm.train [CONFIG.yaml] [--option value ...]", ""]
    lines += [f"Ready files: {', '.join(sorted(path.name for path in CONFIGS.glob('*.yaml')))}", ""]
    lines += _describe(TrainConfig, "")
    for title, of in (
        ("A source of `data` is {path: PATH, ...} with", DataSource),
        ("`options` are", PanoramaConfig),
        ("`options` of the views are", ViewOptions),
    ):
        arguments = (inspect.getdoc(of) or "").split("Args:\n")[1].split("\n\n")[0]
        lines += ["", f"{title}:", *arguments.splitlines()]
    return "\n".join(lines)


def _describe(of: type, prefix: str) -> list[str]:
    lines = []
    types = typing.get_type_hints(of)
    for option in dataclasses.fields(of):
        if dataclasses.is_dataclass(types[option.name]):
            if option.name in STAGES and option.name != STAGES[0]:
                lines.append(f"--{prefix}{option.name}.*: {option.metadata['help']}, the same options")
            else:
                lines.append(f"--{prefix}{option.name}.*: {option.metadata['help']}")
                lines += _describe(types[option.name], f"{prefix}{option.name}.")
            continue
        default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        choices = typing.get_args(types[option.name]) if typing.get_origin(types[option.name]) is Literal else ()
        one_of = f", one of {', '.join(choices)}" if choices else ""
        words = textwrap.wrap(f"{option.metadata['help']}{one_of} (default: {default})", 90)
        lines += [f"--{prefix}{option.name}", *(f"      {line}" for line in words)]
    return lines


def _dotlist(arguments: list[str]) -> list[str]:
    """`--a.b-c 1 --d` -> `a.b_c=1`, `d=true`."""
    settings = []
    while arguments:
        option = arguments.pop(0)
        if not option.startswith("--"):
            raise ValueError(f"expected --option value, got {option!r}; a YAML file comes first")
        name, equals, value = option[2:].partition("=")
        if not equals:
            value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "true"
        name = name.replace("-", "_")
        if name.split(".")[-1] == "data" and not value.startswith("["):
            value = f"[{{path: '{value}'}}]"
        settings.append(f"{name}={value}")
    return settings


def _resolve(source: DataSource) -> DataSource:
    images = None if source.images is None else package_path(source.images)
    return dataclasses.replace(source, path=package_path(source.path), images=images)
