"""What training a configuration costs, before anything is loaded: `python -m panorama_vlm.plan CONFIG.yaml`.

CONFIG is what the trainer takes (a file, or the name of a ready one, and `--option value`), or a saved folder. Of each
stage it prints parameters, tokens, FLOPs and bytes, and the largest batch that a GPU holds. Nothing is downloaded but
configurations, no weights are made, and no accelerator is needed. `docs/plan.md` says how well it agrees with what is
measured, and what it leaves out.

**FLOPs** of a step are those of its matrix products, convolutions and attention, two for each multiplication and
addition. A weight through which n tokens go costs 2 n FLOPs forward, as much again for the gradient of its input where
something before it trains, and as much for its own where it trains; attention over T tokens in H heads of Q dimensions
costs 4 T^2 H Q a layer forward and twice that backward (2.5 times where it computes its scores anew, as flash attention
does). Where all of a language model of N matrix weights and L layers trains, that is 6 N + 12 L H Q T for each token
(Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B; Kaplan et al. 2020, arXiv:2001.08361, section 2.1). They are
counted on the model itself (`torch.utils.flop_counter`), run forward and backward on tensors without content, so that
frozen parts, resamplers of any kind and recomputation are as they are.

**Bytes** of a step are those of weights (float32), gradients, what the optimizer keeps, and the activations that
backward needs; the same run tells which tensors are alive at once.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoTokenizer

from .configuration_panorama import IMAGE_TOKEN, PanoramaConfig
from .language_loss_panorama import CHUNK_BYTES, summed_cross_entropy
from .modeling_panorama import PanoramaVLM
from .options_panorama import check_number, check_one_of, check_whole
from .tokens_panorama import forget_constants
from .train.build import bytes_tokenizer, checkpoint_activations, part_config, starting_vlm
from .train.config import ComposeConfig, StageConfig, TrainConfig, load_config
from .train.optimizers import make_optimizer, parameter_groups
from .vlm_panorama import vlm_config, vlm_options, vlm_source

GIB = 2**30
USABLE = 0.9  # of a GPU's memory: the rest is the context and what lies between tensors
LARGEST, LARGEST_BATCH = 2**20, 2**12  # tokens of text and samples of a micro-batch
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Text:
    """The words of a sample.

    Args:
        tokens: of question and answer, >= 1.
        answer: how many of them are supervised, in [0, tokens].
    """

    tokens: int = 128
    answer: int = 64

    def __post_init__(self) -> None:
        self.tokens = check_whole("tokens of text", self.tokens, 128)
        self.answer = check_whole("tokens of an answer", self.answer, 64, least=0)
        if self.answer > self.tokens:
            raise ValueError(f"tokens of an answer must be at most those of the text, {self.tokens}, got {self.answer}")


@dataclass
class Pass:
    """One forward and backward pass of a micro-batch, and the update.

    Args:
        flops: of forward and backward.
        activations: bytes that forward leaves for backward.
        peak: most bytes alive at once, with weights, gradients and optimizer.
    """

    flops: int
    activations: int
    peak: int


@dataclass
class StagePlan:
    """What a stage costs. Bytes, parameters and FLOPs; those of a step are of `accumulation` micro-batches.

    Args:
        passes: by whether activations are recomputed.
        largest_batch: likewise, the samples of a micro-batch that fit; 0 where none does.
    """

    name: str
    optimizer: str
    batch_size: int
    accumulation: int
    parameters: int
    trained: int
    views: int
    tokens_per_view: int
    image_tokens: int
    sample_tokens: int
    weights: int
    gradients: int
    optimizer_state: int
    logits: int
    logits_chunk: int
    passes: dict[bool, Pass]
    largest_batch: dict[bool, int]


def plan_run(
    config: TrainConfig, text: Text | None = None, precision: str = "bf16", gpu_memory: float | None = None
) -> list[StagePlan]:
    """What each stage of a run costs on one GPU.

    Args:
        config: of the run.
        text: of a sample.
        precision: `"bf16"`, `"fp16"` or `"no"`, what `accelerate launch --mixed_precision` says.
        gpu_memory: of one GPU, in GiB.

    Raises:
        ValueError: for a model, tower or language model whose configuration cannot be found, or options that do
            not fit.
    """
    text = text or Text()
    check_one_of("precision", precision, list(PRECISIONS))
    if gpu_memory is not None and check_number("gpu_memory", gpu_memory, 24) > LARGEST:
        raise ValueError(f"gpu_memory must be at most {LARGEST} GiB, got {gpu_memory}. Typical value: 24")
    for stage in config.stages:
        size = config.stage_config(stage).batch_size
        if size * text.tokens > LARGEST or size > LARGEST_BATCH:
            raise ValueError(
                f"a micro-batch of {size} samples of {text.tokens} tokens of text ({stage}.batch_size) is none for one "
                f"GPU: at most {LARGEST_BATCH} samples and {LARGEST} tokens are planned"
            )
    model_config = panorama_config(config)
    return [plan_stage(model_config, config, stage, text, precision, gpu_memory) for stage in config.stages]


def plan_stage(
    model_config: PanoramaConfig,
    config: TrainConfig,
    stage: str,
    text: Text,
    precision: str = "bf16",
    gpu_memory: float | None = None,
) -> StagePlan:
    """What one stage costs; see :func:`plan_run`."""
    options = config.stage_config(stage)
    model = _on_meta(model_config, stage, config.attention)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    asks = stage != "vision"
    vocabulary = model_config.text_config.vocab_size * 4
    sample = (
        model_config.num_image_tokens + text.tokens if asks else model_config.num_views * model_config.tokens_per_view
    )
    supervised = options.batch_size * text.answer
    fixed = weights + _optimizer_state(model, options)
    passes, largest = {}, {}
    for recompute in (False, True):
        passes[recompute] = simulate(
            model_config, stage, options, options.batch_size, text, precision, recompute, config.attention
        )
        if gpu_memory is not None:
            grows = passes[recompute].peak - fixed
            largest[recompute] = max(0, int((USABLE * gpu_memory * GIB - fixed) * options.batch_size / grows))
    return StagePlan(
        name=stage,
        optimizer=options.optimizer,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        views=model_config.num_views,
        tokens_per_view=model_config.tokens_per_view,
        image_tokens=model_config.num_image_tokens,
        sample_tokens=sample,
        weights=weights,
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer_state=_optimizer_state(model, options),
        logits=options.batch_size * sample * vocabulary if asks else 0,
        logits_chunk=min(supervised, max(CHUNK_BYTES // vocabulary, 1)) * vocabulary if asks else 0,
        passes=passes,
        largest_batch=largest,
    )


def simulate(
    config: PanoramaConfig,
    stage: str,
    options: StageConfig,
    batch: int,
    text: Text,
    precision: str = "bf16",
    recompute: bool = False,
    attention: str = "auto",
    foreach: bool = True,
) -> Pass:
    """One micro-batch and one update, on tensors that have a shape and no content.

    Args:
        config: of the model.
        stage: that is trained.
        options: of the stage.
        batch: samples in the micro-batch.
        text: of each sample.
        precision: of autocast.
        recompute: whether activations are recomputed in backward.
        attention: `"eager"` lays the matrix of all pairs of tokens down; everything else here does not.
        foreach: whether the optimizer works on all tensors at once, as it does on GPUs.
    """
    model = _on_meta(config, stage, attention)
    dtype = PRECISIONS[precision]
    with _without_content():
        model = model.to_empty(device="cpu")
        model.tie_weights()
        if recompute:
            checkpoint_activations(model)
        optimizer = make_optimizer(model, options)
        for part in (getattr(optimizer, "adamw", optimizer), getattr(optimizer, "muon", None)):
            for group in [] if part is None else part.param_groups:
                if "foreach" in group:
                    group["foreach"] = foreach
        size = config.image_size
        pixels = torch.empty(batch, config.num_views, 3, size, size)
        there = [*model.parameters(), *model.buffers(), pixels]
        alive, flops = _Alive(there), FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with alive:
            with flops:
                with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
                    loss = _loss(model, stage, pixels, text)
                activations = alive.now
                if recompute:
                    alive.limit = activations
                loss.backward()
            pass_peak = alive.peak
            del loss
            alive.peak = alive.now
            optimizer.step()
        state = sum(t.nbytes for kept in optimizer.state.values() for t in kept.values() if isinstance(t, torch.Tensor))
        weights = sum(tensor.nbytes for tensor in there)
        # The optimizer's state is there from the second step on: before the update it lies beside the activations.
        return Pass(int(flops.get_total_flops()), activations, weights + max(pass_peak + state, alive.peak))


def _loss(model: PanoramaVLM, stage: str, pixels: torch.Tensor, text: Text) -> torch.Tensor:
    """The loss of a stage, as `PanoramaVLM.forward` makes it where each sample has as many supervised tokens."""
    if stage == "vision":
        output: Any = model(pixel_values=pixels, stage="vision")
        return output.loss
    image = model.get_image_features(pixels, return_dict=True)
    words = model.get_input_embeddings()(torch.zeros(len(pixels), text.tokens, dtype=torch.long))
    embeddings = torch.cat([image.pooler_output.to(words.dtype), words], 1)
    hidden = model.model(
        inputs_embeds=embeddings, use_cache=False, position_ids=_positions(model, embeddings)
    ).last_hidden_state
    last = hidden[:, -text.answer - 1 : -1].flatten(0, 1)
    labels = torch.zeros(len(last), dtype=torch.long)
    loss = summed_cross_entropy(last, model.lm_head, labels, model.config.text_config.vocab_size, model._logits)
    if model.config.overlap_loss_weight_finetune > 0:
        loss = loss + model.overlap_loss(image.last_hidden_state)[0]
    return loss


def _positions(model: PanoramaVLM, embeddings: torch.Tensor) -> torch.Tensor | None:
    """What `panorope` asks for."""
    if model.config.position_encoding != "panorope":
        return None
    return torch.zeros(embeddings.shape[:2])


class _Alive(TorchDispatchMode):
    """How many bytes of tensors that were made in this mode are alive, and were at most.

    Args:
        there: those that were there before, of which views do not count either.

    Attributes:
        limit: bytes above which garbage is collected first, and it rises: what is recomputed without content hangs in
            cycles.

    What asks a tensor for a number, which there is none of here, is told that all is well.
    """

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.limit = math.inf
        self._there = [tensor.untyped_storage() for tensor in there]  # kept, so that none takes its place
        self._known: dict[int, Any] = {id(storage): None for storage in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self.now += size
        if self.now > self.limit:
            gc.collect()
            self.limit = max(self.limit, 1.03 * self.now)
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


@contextmanager
def _without_content() -> Iterator[None]:
    """Tensors have no content in here, and none of them is left behind in a cache."""
    try:
        gc.collect()
        gc.freeze()  # what is there already is not looked through again and again
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        forget_constants()


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, rows, width = query  # scores anew, and the gradients of values, weights, queries and keys
    return 2 * batch * heads * rows * key[-2] * (3 * width + 2 * value[-1])


# Flash attention as torch has it on CPUs, which its counter does not know.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _on_meta(config: PanoramaConfig, stage: str, attention: str) -> PanoramaVLM:
    """The model without weights, with the stage set."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PanoramaVLM(config)
        if attention == "eager":
            model.set_attn_implementation(attention)
        model.set_stage(stage)  # type: ignore[arg-type]
    return model


def _optimizer_state(model: PanoramaVLM, options: StageConfig) -> int:
    """Two moments of AdamW (Kingma, Ba 2015), one of Muon, in float32."""
    by_muon, by_adamw = parameter_groups(model, options)
    size = lambda groups: sum(p.nbytes for group in groups for p in group["params"])  # noqa: E731
    return size(by_muon) + 2 * size(by_adamw)


# What a configuration is made of


def panorama_config(config: TrainConfig) -> PanoramaConfig:
    """The configuration of the model that a run trains, from configurations alone.

    Raises:
        ValueError: for one that cannot be found; what to name is said.
    """
    if (vlm := starting_vlm(config, None)) is not None:
        option = "compose.vlm" if config.model is None else "model"
        return _found(option, str(vlm.vlm), _of_vlm, parts=vlm, of=config)
    if config.model is not None:
        return _found("model", config.model, PanoramaConfig.from_pretrained, **config.options)
    parts, halves = config.compose, {}
    given = (("vision", parts.vision, parts.vision_kwargs), ("language", parts.language, parts.language_kwargs))
    for name, of_which, kwargs in given:
        kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        if isinstance(of_which, str):
            halves[name] = _found(f"compose.{name}", of_which, AutoConfig.from_pretrained, **kwargs)
        else:
            halves[name] = part_config(f"compose.{name}", of_which)
    text_config = halves["language"].get_text_config()
    rows = _words(config)
    if isinstance(parts.language, dict) and "vocab_size" not in parts.language:
        if rows is None:
            raise ValueError("compose.language must say its vocab_size, where compose.tokenizer cannot be found here")
        text_config.vocab_size = rows
    elif rows is not None:  # a row for <image>, where there is none
        text_config.vocab_size = max(text_config.vocab_size, rows)
    return PanoramaConfig(halves["vision"], text_config, **{"image_token_id": 0, **config.options})


def _of_vlm(name: str, parts: ComposeConfig, of: TrainConfig) -> PanoramaConfig:
    """The configuration of a model that is made from a vision-language model."""
    source, theirs = vlm_source(name, None, parts.vlm_kwargs), vlm_config(name, parts.vlm_kwargs)
    options = vlm_options(name, theirs, source, of.options)
    text = options["text_config"]
    text.vocab_size = max(text.vocab_size, 1 + max(options["image_token_id"], *options["silent_token_ids"], 0))
    return PanoramaConfig(**options)


def _words(config: TrainConfig) -> int | None:
    """How many ids the tokenizer of a run has, with `<image>`; `None` where it cannot be found."""
    name = config.compose.tokenizer or config.compose.language
    try:
        tokenizer = bytes_tokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return len(tokenizer)


def _found(option: str, name: str, load: Any, **kwargs: Any) -> Any:
    try:
        return load(name, **kwargs)
    except OSError as error:
        raise ValueError(
            f"{option}: {name!r} is no folder here and no repo that the Hub gives. Its config.json is enough: name a "
            f"folder that holds it with --{option} FOLDER"
        ) from error


# The table


def table(plans: Sequence[StagePlan], gpu_memory: float | None) -> str:
    """What :func:`plan_run` found, a column a stage."""
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, *values: Any) -> None:
        rows.append((name, [str(value) for value in values]))

    row("", *(plan.name for plan in plans))
    row("parameters", *(_count(plan.parameters) for plan in plans))
    row("  trained", *(_count(plan.trained) for plan in plans))
    row("views a panorama", *(plan.views for plan in plans))
    row("tokens a view", *(plan.tokens_per_view for plan in plans))
    row("tokens a panorama", *(f"{plan.image_tokens:,}" if plan.name != "vision" else "-" for plan in plans))
    row("tokens a sample", *(f"{plan.sample_tokens:,}" for plan in plans))
    row("samples a step", *(f"{plan.batch_size} x {plan.accumulation}" for plan in plans))
    for recompute, words in ((False, ""), (True, ", checkpointed")):
        row(f"FLOPs a step{words}", *(_count(plan.passes[recompute].flops * plan.accumulation) for plan in plans))
    row("weights", *(_bytes(plan.weights) for plan in plans))
    row("gradients", *(_bytes(plan.gradients) for plan in plans))
    row("optimizer state", *(f"{_bytes(plan.optimizer_state)} ({plan.optimizer})" for plan in plans))
    for recompute, words in ((False, ""), (True, ", checkpointed")):
        row(f"activations{words}", *(_bytes(plan.passes[recompute].activations) for plan in plans))
    row("logits of all positions (not made)", *(_bytes(plan.logits) if plan.logits else "-" for plan in plans))
    row("logits at once", *(_bytes(plan.logits_chunk) if plan.logits else "-" for plan in plans))
    for recompute, words in ((False, ""), (True, ", checkpointed")):
        peaks = [plan.passes[recompute].peak for plan in plans]
        row(f"peak of a step{words}", *map(_bytes, peaks))
        if gpu_memory is not None:
            limit = USABLE * gpu_memory * GIB
            row(f"  fits {gpu_memory:g} GiB", *("yes" if peak <= limit else "no" for peak in peaks))
            row("  largest micro-batch", *(plan.largest_batch[recompute] or "none" for plan in plans))
    first = max(len(name) for name, _ in rows)
    widths = [max(len(values[i]) for _, values in rows) for i in range(len(plans))]
    lines = [
        "  ".join(
            [name.ljust(first), *(value.rjust(width) for value, width in zip(values, widths, strict=True))]
        ).rstrip()
        for name, values in rows
    ]
    return "\n".join(lines)


def _count(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))


def _bytes(value: float) -> str:
    for size, unit in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{int(value)} B"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file of the trainer, the name of a ready one, or a saved folder")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="also say what fits into so much")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16", help="of autocast (default: bf16)")
    parser.add_argument("--text-tokens", type=int, default=128, help="of question and answer (default: 128)")
    parser.add_argument("--answer-tokens", type=int, default=64, help="of them, those of the answer (default: 64)")
    given, options = parser.parse_known_args(arguments)
    try:
        if not 0 < given.answer_tokens < given.text_tokens:
            raise ValueError(
                f"--answer-tokens must be positive and less than --text-tokens, got {given.answer_tokens} of "
                f"{given.text_tokens}"
            )
        is_folder = Path(given.config).is_dir()
        start = ["--model", given.config, "--data", "."] if is_folder else [given.config]
        config = load_config([*start, *options])
        plans = plan_run(config, Text(given.text_tokens, given.answer_tokens), given.precision, given.gpu_memory)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    words = f"{given.text_tokens} tokens of text, {given.answer_tokens} of them an answer"
    used = "on" if config.gradient_checkpointing else "off"
    print(f"One process, mixed precision {given.precision!r}, {words}; gradient_checkpointing is {used}.\n")
    print(table(plans, given.gpu_memory))


if __name__ == "__main__":
    main()
