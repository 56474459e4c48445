"""What one finetune step costs beside the same step with all tokens and full logits, and beside LLaVA-OneVision.

    python -m panorama_vlm.benchmarks.train_step [--smoke] [--layers 30] [--batch 1 2] [--threads 2] [--device cuda]

Three models see the same nine views of a panorama (eight tiles and a global view, 16 x 16 tokens each) and learn the
same 64 answer tokens:

    ours            `PanoramaVLM` as it trains: owned tokens, loss on supervised positions only
    (a) full        `PanoramaVLM` with `token_selection="all"` and `return_logits=True`
    (b) onevision   transformers' `LlavaOnevisionForConditionalGeneration`. The tiles are its anyres grid of 2 x 4 in an
                    image of 512 x 1024 that fills it, so that nothing is unpadded, resized or pooled; its packing adds
                    one newline token to each of the 32 rows

Tower (SigLIP, frozen, small so that it decides nothing), body (Qwen2 layers, LoRA), dtype, optimizer (AdamW) and
attention (SDPA) are the same; the projector trains (ours: resampler and projection). No cache is kept.

Time is forward, backward and optimizer step: the median over repetitions in which the models take turns, each in a
process of its own. Peak activation memory is the peak of one step above what the process holds before it. Weights,
gradients and optimizer states are there before it, so that this is what a step keeps for backward, and temporaries.

Exits with 1 where losses or gradients differ by more than 1e-4 where tokens are equal.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from panorama_vlm import PanoramaConfig, PanoramaVLM
from panorama_vlm.benchmarks.overlap_loss import peak_resident, reset_peak_resident
from torch import Tensor

TOLERANCE = 1e-4
LAYERS = 4  # of the default run, which is to take minutes
SHAPES = {  # of the body: SmolLM2-135M and Qwen2.5-0.5B
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    "smoke": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
}
DEPTHS = {"smollm2": 30, "qwen": 24, "smoke": 2}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PYTHON = [sys.executable, "-W", "ignore::FutureWarning", __file__]
VARIANTS = {"ours": "ours", "full": "(a) all tokens, full logits", "onevision": "(b) LLaVA-OneVision"}


class Sizes(NamedTuple):
    """What is compared."""

    body: str = "smollm2"
    layers: int = LAYERS
    vocabulary: int = 151_936
    image_size: int = 256  # of a view, with patches of 16
    tower_width: int = 192
    tower_layers: int = 4
    prompt: int = 16
    answer: int = 64
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def text(self) -> dict[str, Any]:
        shape = SHAPES[self.body]
        common = {"model_type": "qwen2", "tie_word_embeddings": True, "max_position_embeddings": 8192}
        return {**common, **shape, "num_hidden_layers": self.layers, "vocab_size": self.vocabulary}

    @property
    def tower(self) -> dict[str, Any]:
        return {
            "model_type": "siglip_vision_model",
            "hidden_size": self.tower_width,
            "intermediate_size": 4 * self.tower_width,
            "num_hidden_layers": self.tower_layers,
            "num_attention_heads": max(self.tower_width // 64, 1),
            "image_size": self.image_size,
            "patch_size": 16,
            "vision_use_head": False,
        }


Step = Callable[[], Tensor]


def our_model(sizes: Sizes, token_selection: str) -> PanoramaVLM:
    """In stage `finetune`, with LoRA."""
    torch.manual_seed(0)
    config = PanoramaConfig(
        sizes.tower,
        sizes.text,
        image_token_id=sizes.vocabulary - 1,
        token_selection=token_selection,
        latent_dimension=sizes.tower_width,
        lora_target_modules=LORA_TARGETS,
        lora_dropout=0.0,
        use_vicreg_projector=False,
    )
    model = PanoramaVLM(config).to(sizes.device, getattr(torch, sizes.dtype))
    model.set_stage("finetune")
    return model


def onevision_model(sizes: Sizes, lora: PanoramaConfig) -> Any:
    """LLaVA-OneVision with the same tower and body, which trains the same: LoRA, and the projector."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=sizes.tower,
        text_config=sizes.text,
        image_token_index=sizes.vocabulary - 1,
        video_token_index=sizes.vocabulary - 2,
        image_grid_pinpoints=[[2 * sizes.image_size, 4 * sizes.image_size]],
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config).to(sizes.device, getattr(torch, sizes.dtype))
    body = r".*language_model.*\.(" + "|".join(LORA_TARGETS) + ")"
    adapted = get_peft_model(
        model, LoraConfig(r=lora.lora_rank, lora_alpha=lora.lora_alpha, lora_dropout=0.0, target_modules=body)
    )
    for name, parameter in adapted.named_parameters():
        if "multi_modal_projector" in name or "image_newline" in name:
            parameter.requires_grad_(True)
    return adapted.train()


def make_batch(sizes: Sizes, batch: int, image_tokens: int) -> dict[str, Tensor]:
    """Nine views, and `[image tokens, prompt, answer]` with labels on the answer."""
    generator = torch.Generator().manual_seed(0)
    size, words = sizes.image_size, sizes.prompt + sizes.answer
    pixels = torch.randn(batch, 9, 3, size, size, generator=generator)
    text = torch.randint(2, sizes.vocabulary - 2, (batch, words), generator=generator)
    ids = torch.cat([torch.full((batch, image_tokens), sizes.vocabulary - 1), text], 1)
    labels = ids.clone()
    labels[:, : -sizes.answer] = -100
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    moved = {name: tensor.to(sizes.device) for name, tensor in tensors.items()}
    return {**moved, "pixel_values": pixels.to(sizes.device, getattr(torch, sizes.dtype))}


def make_step(variant: str, sizes: Sizes, batch: int) -> tuple[Step, dict[str, int]]:
    """One finetune step, which returns the loss, and what there is to know of it."""
    options: dict[str, Any] = {"use_cache": False}
    if variant == "onevision":
        lora = PanoramaConfig(sizes.tower, sizes.text)
        model = onevision_model(sizes, lora)
        rows = 2 * sizes.image_size // 16  # of the tiles together, each with a newline
        tokens = 9 * (sizes.image_size // 16) ** 2 + rows
        size = [2 * sizes.image_size, 4 * sizes.image_size]
        options["image_sizes"] = torch.tensor([size] * batch, device=sizes.device)
    else:
        model = our_model(sizes, "all" if variant == "full" else "owned")
        tokens = model.config.num_image_tokens
        options["return_logits"] = variant == "full"
    inputs = {**make_batch(sizes, batch, tokens), **options}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, foreach=False)

    def step() -> Tensor:
        loss: Tensor = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return step, {"image_tokens": tokens, "trained": sum(parameter.numel() for parameter in trained)}


# Processes


def seconds_of(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_activation_bytes(step: Step, device: str) -> int:
    """Peak of a step above what the process holds before it; steps have been made before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps for later would count as held before the step
    except AttributeError:
        pass
    before = reset_peak_resident()
    step()
    return peak_resident() - before


def serve(variant: str, sizes: Sizes, batch: int) -> None:
    """The process of one model: answers each line of stdin, `time` or `peak`, with a line of JSON."""
    step, facts = make_step(variant, sizes, batch)
    print(json.dumps({**facts, "loss": step().item()}), flush=True)
    for line in sys.stdin:
        measure = {"time": seconds_of, "peak": peak_activation_bytes}[line.strip()]
        print(json.dumps(measure(step, sizes.device)), flush=True)


class Worker:
    """A process that holds one model and makes a step when told to."""

    def __init__(self, variant: str, sizes: Sizes, batch: int, threads: int):
        command = [*PYTHON, "--threads", str(threads), "--serve", variant, json.dumps(sizes), str(batch)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a model ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# What is printed


def compare(sizes: Sizes, batch: int, repetitions: int, threads: int, variants: Sequence[str]) -> str:
    """Prints the lines of one batch size and returns the verdict."""
    workers: dict[str, Worker] = {}
    try:
        for variant in variants:  # making them one after another, each warms up with one step
            workers[variant] = Worker(variant, sizes, batch, threads)
        times: dict[str, list[float]] = {variant: [] for variant in workers}
        for _ in range(repetitions):
            for variant, worker in workers.items():
                times[variant].append(worker.ask("time"))
        peaks = {variant: worker.ask("peak") / 2**20 for variant, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    seconds = {variant: statistics.median(values) for variant, values in times.items()}
    for variant, worker in workers.items():
        facts = worker.facts
        cells = [str(batch), VARIANTS[variant], str(facts["image_tokens"]), f"{facts['trained'] / 1e6:.2f} M"]
        cells += [f"{seconds[variant]:.2f} s", f"{min(times[variant]):.2f}-{max(times[variant]):.2f}"]
        cells += [f"{seconds[variant] / seconds['ours']:.1f} x", f"{peaks[variant]:.0f} MiB"]
        cells += [f"{peaks[variant] / peaks['ours']:.1f} x"]
        print("|", " | ".join(cells), "|", flush=True)
    faster, share = seconds["onevision"] / seconds["ours"], peaks["ours"] / peaks["onevision"]
    return (
        f"Batch {batch}: {faster:.1f} times as fast as (b) (target: at least 2), peak activation memory {share:.2f} of "
        "(b) (target: at most 0.33)."
    )


def differences(sizes: Sizes) -> dict[str, float]:
    """How far losses and gradients are apart where weights and tokens are equal.

    All on the embeddings that `PanoramaVLM` makes of all tokens of the nine views; gradients are those of these
    embeddings, relative to their norm.
    """
    model = our_model(sizes, "all")
    inputs = make_batch(sizes, 1, model.config.num_image_tokens)
    labels, ids = inputs["labels"], inputs["input_ids"]
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        words = model.get_input_embeddings()(ids)
        embeds = words.masked_scatter((ids == sizes.vocabulary - 1)[..., None], features)
    model.config.image_token_id = None  # to the peer the placeholder is a word like others, which the loss can see
    peer = onevision_model(sizes, model.config).get_base_model()
    ours = copy.deepcopy(model.model.language_model).merge_and_unload()  # adapters start as zero
    wanted = {
        name.replace("model.", "", 1): value for name, value in ours.state_dict().items() if "lm_head" not in name
    }
    body = {
        name.replace(".base_layer", ""): parameter for name, parameter in peer.model.language_model.named_parameters()
    }
    with torch.no_grad():
        for name, value in wanted.items():
            body[name].copy_(value)

    def measure(net: Any, **options: Any) -> tuple[float, Tensor]:
        given = embeds.clone().requires_grad_()
        loss = net(inputs_embeds=given, labels=labels, use_cache=False, **options).loss
        (gradient,) = torch.autograd.grad(loss, given)
        return loss.item(), gradient

    loss, gradient = measure(model)
    results = {"loss": loss}
    for name, net, options in (("full logits", model, {"return_logits": True}), ("LLaVA-OneVision", peer, {})):
        other, expected = measure(net, **options)
        results[f"loss against {name}"] = abs(loss - other)
        results[f"gradient against {name}"] = float((gradient - expected).norm() / expected.norm())
    return results


def check(sizes: Sizes, threads: int) -> bool:
    """Prints `differences`, found in a process of its own, and whether they are small enough."""
    command = [*PYTHON, "--threads", str(threads), "--differences", json.dumps(sizes)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, float] = json.loads(result.stdout)
    print(f"Equal where tokens are equal: all tokens, one panorama, loss {values.pop('loss'):.6f}; chunked loss")
    for name, value in values.items():
        print(f"  {name}: {value:.1e} apart")
    equal = all(value <= TOLERANCE for value in values.values())
    print(f"  {'all within' if equal else 'NOT within'} {TOLERANCE:g}\n", flush=True)
    return equal


def print_header(sizes: Sizes, repetitions: int, threads: int) -> None:
    text, depth = sizes.text, DEPTHS[sizes.body]
    where = torch.cuda.get_device_name() if sizes.device == "cuda" else f"{threads} threads of {os.cpu_count()} CPUs"
    memory = "allocated by CUDA" if sizes.device == "cuda" else "resident (VmHWM on Linux)"
    print(f"One finetune step, {sizes.dtype}; torch {torch.__version__}, {where}.")
    print(
        f"Body: Qwen2 layers of the shape of {sizes.body}, hidden {text['hidden_size']}, {sizes.layers} of its {depth} "
        f"layers, vocabulary {sizes.vocabulary}, LoRA."
    )
    if sizes.layers < depth:
        print(f"Fewer layers let the vocabulary weigh more than it does in the whole body: --layers {depth} for all.")
    print(
        f"Tower: SigLIP, {sizes.tower_layers} layers of {sizes.tower_width}, frozen. Nine views of {sizes.image_size} "
        f"px, patches of 16, {sizes.prompt} prompt and {sizes.answer} supervised tokens."
    )
    print(f"Median of {repetitions} interleaved repetitions after one warm-up. Peak activation memory: most")
    print(f"{memory}, above what was held before the step (weights, gradients, optimizer states).\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of one finetune step.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test; its ratios say nothing")
    parser.add_argument("--body", choices=("smollm2", "qwen"), default="smollm2", help="whose shape the layers have")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of the body (default: {LAYERS})")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="panoramas a step (default: 1)")
    parser.add_argument("--repetitions", type=int, default=3, help="the median of them is shown (default: 3)")
    parser.add_argument("--without-full", action="store_true", help="leave (a) out, which takes as long as (b)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--serve", nargs=3, metavar=("VARIANT", "SIZES", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--differences", metavar="SIZES", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.serve:
        variant, sizes, batch = arguments.serve
        serve(variant, Sizes(*json.loads(sizes)), int(batch))
        return
    if arguments.differences:
        print(json.dumps(differences(Sizes(*json.loads(arguments.differences)))))
        return

    variants = [variant for variant in VARIANTS if variant != "full" or not arguments.without_full]
    sizes = Sizes(arguments.body, arguments.layers, device=arguments.device, dtype=arguments.dtype)
    repetitions = arguments.repetitions
    if arguments.smoke:
        sizes = sizes._replace(body="smoke", layers=1, vocabulary=997, image_size=64, tower_width=32, tower_layers=1)
        sizes, repetitions = sizes._replace(prompt=4, answer=8), 1
    print_header(sizes, repetitions, arguments.threads)
    equal = check(sizes._replace(dtype="float32"), arguments.threads)
    print("| batch | model | image tokens | trained | step | min-max s | time | peak activations | memory |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    verdicts = [compare(sizes, batch, repetitions, arguments.threads, variants) for batch in arguments.batch]
    print("", *verdicts, sep="\n")
    if not equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
