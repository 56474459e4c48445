"""How long does an answer take beside the sum of its parts, and beside LLaVA-OneVision?

    python -m panorama_vlm.benchmarks.generate [--smoke] [--body smollm2 qwen3] [--batch 1 4] [--answer 16 128]

Three answer about the same nine views of a panorama (eight tiles and a global view, 16 x 16 tokens each), greedily,
from random weights, with as many new tokens as are asked for:

    ours            `PanoramaVLM.generate` on pixels and ids
    (a) parts       its vision tower alone on the views, and its language model alone on the embeddings that ours makes
                    (`AutoModelForCausalLM.generate`): the same modules with the same weights
    (b) onevision   transformers' `LlavaOnevisionForConditionalGeneration`, tower and language model of the same shapes.
                    The tiles are its anyres grid of 2 x 4 in an image that fills it, so that nothing is unpadded,
                    resized or pooled; its packing adds one newline token to each of the 32 rows

The time to the first token is that from pixels and ids to its id; tokens a second are those of all rows after the first
token. Medians over repetitions in which the three take turns in one process, after one warm-up. Below the table stands
where ours spends its time, by hooks on its parts.

Exits with 1 where ours and (a) do not give the same tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from panorama_vlm import PanoramaConfig, PanoramaVLM
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    StoppingCriteriaList,
)

TOWER = {  # SigLIP base, on views of 256 pixels
    "model_type": "siglip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 256,
    "patch_size": 16,
    "vision_use_head": False,
}
BODIES: dict[str, dict[str, Any]] = {  # SmolLM2-135M and Qwen3-0.6B
    "smollm2": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152},
    "qwen3": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
    "smoke": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 997},
}
SMOKE_TOWER = {**TOWER, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
VARIANTS = {"ours": "ours", "parts": "(a) the sum of its parts", "onevision": "(b) LLaVA-OneVision"}
PROMPT = 16  # words behind the panorama


class Answer(NamedTuple):
    """What one answer took, in seconds, and its tokens [B, new]."""

    first: float
    others: float
    tokens: Tensor


class Clock:
    """Tells the time when all work is done, and takes it down at each token, where `generate` asks whether to stop."""

    def __init__(self, device: str):
        self.device = device
        self.stamps: list[float] = []

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.stamps.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def answer(
        self, model: Any, inputs: dict[str, Tensor], new: int, before: Callable[[], Any] | None = None
    ) -> Answer:
        """Time `model.generate`, and what comes `before` it."""
        self.stamps.clear()
        start = self.now()
        if before is not None:
            with torch.no_grad():
                before()
        criteria = StoppingCriteriaList([self])
        sequences = model.generate(**inputs, max_new_tokens=new, do_sample=False, stopping_criteria=criteria)
        return Answer(self.stamps[0] - start, self.stamps[-1] - self.stamps[0], sequences[:, -new:])


class Setting(NamedTuple):
    """What is compared."""

    tower: dict[str, Any]
    body: dict[str, Any]
    device: str
    dtype: torch.dtype

    @property
    def text(self) -> dict[str, Any]:
        return {**self.body, "tie_word_embeddings": True, "max_position_embeddings": 8192}

    @property
    def placeholder(self) -> int:
        return int(self.body["vocab_size"]) - 1


def never_ends(model: Any, setting: Setting) -> Any:
    """In evaluation mode, and with no token at which an answer would end."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(setting.device, setting.dtype).eval()


def our_model(setting: Setting) -> tuple[PanoramaVLM, Any]:
    """Ours, and the language model of which it is composed, as it is without it."""
    torch.manual_seed(0)
    language = never_ends(AutoModelForCausalLM.from_config(AutoConfig.for_model(**setting.text)), setting)
    tower = AutoModel.from_config(AutoConfig.for_model(**setting.tower))
    width = setting.tower["hidden_size"]
    config = PanoramaConfig(setting.tower, setting.text, latent_dimension=width, image_token_id=setting.placeholder)
    return never_ends(PanoramaVLM(config, vision_tower=tower, language_model=language), setting), language


def onevision_model(setting: Setting) -> Any:
    torch.manual_seed(0)
    size = setting.tower["image_size"]
    config = LlavaOnevisionConfig(
        vision_config=setting.tower,
        text_config=setting.text,
        image_token_index=setting.placeholder,
        video_token_index=setting.placeholder - 1,
        image_grid_pinpoints=[[2 * size, 4 * size]],
        tie_word_embeddings=True,
    )
    return never_ends(LlavaOnevisionForConditionalGeneration(config), setting)


def inputs_of(setting: Setting, batch: int, image_tokens: int) -> dict[str, Tensor]:
    """Nine views, and `[image tokens, prompt]`."""
    generator = torch.Generator().manual_seed(0)
    size = setting.tower["image_size"]
    pixels = torch.randn(batch, 9, 3, size, size, generator=generator).to(setting.device, setting.dtype)
    words = torch.randint(2, setting.placeholder - 1, (batch, PROMPT), generator=generator)
    ids = torch.cat([torch.full((batch, image_tokens), setting.placeholder), words], 1).to(setting.device)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


# Where the time goes


class Shares:
    """Seconds spent in modules while it is open, those of the first call and those of all later ones apart."""

    def __init__(self, modules: dict[str, nn.Module], clock: Clock):
        self.seconds = {name: [0.0, 0.0] for name in modules}
        self.calls = dict.fromkeys(modules, 0)
        self._started = 0.0
        self._clock = clock
        self._handles = []
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._start))
            self._handles.append(module.register_forward_hook(self._stop_of(name)))

    def _start(self, *given: Any) -> None:
        self._started = self._clock.now()

    def _stop_of(self, name: str) -> Callable[..., None]:
        def stop(*given: Any) -> None:
            self.seconds[name][self.calls[name] > 0] += self._clock.now() - self._started
            self.calls[name] += 1

        return stop

    def __enter__(self) -> Shares:
        return self

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()


def where_it_goes(model: PanoramaVLM, clock: Clock, inputs: dict[str, Tensor], new: int) -> str:
    """One line of the first token and one of the others."""
    parts = {
        "tower": model.model.vision_tower,
        "resampler": model.model.resampler,
        "projection": model.model.projection,
        "language model": model.model.language_model,
        "head": model.lm_head,
    }
    with Shares(parts, clock) as shares:
        answer = clock.answer(model, inputs, new)
    lines = []
    for later, (what, whole) in enumerate((("first token", answer.first), ("the others", answer.others))):
        spent = {name: seconds[later] for name, seconds in shares.seconds.items() if seconds[later]}
        spent["the rest"] = whole - sum(spent.values())
        cells = [f"{name} {seconds:.3f} s ({100 * seconds / whole:.1f} %)" for name, seconds in spent.items()]
        lines.append(f"{what} {whole:.3f} s: {', '.join(cells)}")
    return "\n".join(lines)


# What is printed


def compare(setting: Setting, batches: Sequence[int], answers: Sequence[int], repetitions: int) -> bool:
    """Prints the lines of one language model; returns whether ours and the sum of its parts gave the same tokens."""
    clock = Clock(setting.device)
    ours, language = our_model(setting)
    peer = onevision_model(setting)
    size = setting.tower["image_size"]
    grid = size // setting.tower["patch_size"]
    tokens = {"ours": ours.config.num_image_tokens, "onevision": 9 * grid**2 + 2 * grid}
    tokens["parts"] = tokens["ours"]
    equal, shares = True, []
    print(
        "| batch | new tokens | model | image tokens | first token | of ours | tokens/s | of ours | answer, of ours |"
    )
    print("|--:|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for batch in batches:
        given, others = (inputs_of(setting, batch, tokens[name]) for name in ("ours", "onevision"))
        others["image_sizes"] = torch.tensor([[2 * size, 4 * size]] * batch, device=setting.device)
        with torch.no_grad():
            features = ours.get_image_features(given["pixel_values"]).pooler_output
            embeds = ours.model.embed(given["input_ids"], features)
        alone = {"inputs_embeds": embeds, "attention_mask": given["attention_mask"]}
        asked: dict[str, tuple[Any, dict[str, Tensor], Tensor | None]] = {
            "ours": (ours, given, None),
            "parts": (language, alone, given["pixel_values"].flatten(0, 1)),
            "onevision": (peer, others, None),
        }
        for new in answers:
            taken: dict[str, list[Answer]] = {name: [] for name in asked}
            for repetition in range(-1, repetitions):  # the first one warms up
                for name, (model, inputs, views) in asked.items():
                    tower = None if views is None else partial(ours.model.vision_tower, pixel_values=views)
                    answer = clock.answer(model, inputs, new, tower)
                    taken[name] += [answer] if repetition >= 0 else []
            equal &= torch.equal(taken["ours"][0].tokens, taken["parts"][0].tokens)
            first = {name: statistics.median(each.first for each in runs) for name, runs in taken.items()}
            rest = {name: statistics.median(each.others for each in runs) for name, runs in taken.items()}
            for name, label in VARIANTS.items():
                cells = [str(batch), str(new), label, str(tokens[name])]
                cells += [f"{first[name]:.3f} s", f"{first[name] / first['ours']:.2f} x"]
                cells += [f"{batch * (new - 1) / rest[name]:.1f}", f"{rest['ours'] / rest[name]:.2f} x"]
                cells += [f"{(first[name] + rest[name]) / (first['ours'] + rest['ours']):.2f} x"]
                print("|", " | ".join(cells), "|", flush=True)
            shares.append(f"Batch {batch}, {new} new tokens\n{where_it_goes(ours, clock, given, new)}")
    print("\nWhere ours spends it:", *shares, sep="\n", end="\n\n")
    return equal


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.generate", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test; its ratios say nothing")
    parser.add_argument("--body", nargs="+", choices=("smollm2", "qwen3"), default=["smollm2"], help="whose shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="panoramas at a time (default: 1)")
    parser.add_argument("--answer", type=int, nargs="+", default=[16, 128], help="new tokens (default: 16 128)")
    parser.add_argument("--repetitions", type=int, default=3, help="the median of them is shown (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    if min(options.answer) < 2:
        parser.error(f"--answer must be at least 2, got {min(options.answer)}. Typical values: 16 128")
    torch.set_num_threads(options.threads)
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{options.threads} threads of {os.cpu_count()} CPUs"
    )
    print(f"Greedy answers from random weights, {options.dtype}; torch {torch.__version__}, {where}.")
    print(f"Nine views, {PROMPT} words of prompt; median of {options.repetitions} interleaved repetitions.")
    equal = True
    for body in ["smoke"] if options.smoke else options.body:
        tower = {**SMOKE_TOWER, "image_size": 64} if options.smoke else TOWER
        shape = BODIES[body]
        print(
            f"\nTower of {tower['num_hidden_layers']} layers of {tower['hidden_size']} (SigLIP); language model of the"
        )
        depth, width, words = (shape[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
        print(f"shape of {body}: {depth} layers of {width}, {words} words.\n")
        setting = Setting(tower, shape, options.device, getattr(torch, options.dtype))
        equal &= compare(setting, options.batch, options.answer, 1 if options.smoke else options.repetitions)
    print("Ours and the sum of its parts gave", "the same tokens." if equal else "DIFFERENT tokens.")
    if not equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
