"""What does a quantised language model forget, and what does it save?

    make train-demo && pip install --no-deps torchao
    python -m panorama_vlm.benchmarks.quantization [--model build/train-demo/finetune] [--data samples] [--threads 2]

A trained model answers its questions with its language model in full precision, in int8 and in int4 (weight-only, by
torchao, through `quantization_config` of `from_pretrained`). Tower, resampler and projection stay as they are.

    weights     bytes of the weights as they lie in memory, scales and zero points among them
    right       answers that are word for word what was expected
    same        tokens of the expected answers of which the most likely is the one that float32 gives, the words before
                being the expected ones
    loss        cross-entropy of the expected answers, in nats a token
    answers/s   greedy, one at a time, beside float32 (the models take turns at each question)

int4 is `Int4WeightOnlyConfig` on a GPU; on a CPU it is that of `torchao.prototype`, the one that has a kernel there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor

ROOT = Path(__file__).resolve().parent.parent
GROUP = 32  # weights that share a scale in int4


def quantizers(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Options of `from_pretrained`, by name.

    Raises:
        ImportError: without torchao.
    """
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    def int4() -> Any:
        if device == "cuda":
            from torchao.quantization import Int4WeightOnlyConfig

            return Int4WeightOnlyConfig(group_size=GROUP)
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP)

    single, half = {"dtype": torch.float32}, {"dtype": torch.bfloat16}
    return {
        "float32": lambda: single,
        "float32, int8": lambda: {**single, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
        "float32, int4": lambda: {**single, "quantization_config": TorchAoConfig(int4())},
        "bfloat16": lambda: half,
        "bfloat16, int8": lambda: {**half, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
        "bfloat16, int4": lambda: {**half, "quantization_config": TorchAoConfig(int4())},
    }


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor as it lies in memory: of a quantised one those of all that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weights_mib(module: nn.Module) -> float:
    return sum(stored_bytes(parameter.data) for parameter in module.parameters()) / 2**20


class Asked:
    """One model and what is found out about it, sample by sample."""

    def __init__(self, folder: Path, processor: PanoramaProcessor, device: str, options: dict[str, Any]):
        self.model = PanoramaVLM.from_pretrained(folder, device_map=device, **options).eval()
        self.processor = processor
        self.right = 0
        self.seconds = 0.0
        self.losses: list[Tensor] = []
        self.likeliest: list[Tensor] = []

    def ask(self, panorama: Path, question: str, answer: str, new: int) -> None:
        """Let it answer, and see what it makes of the expected answer."""
        user = {
            "role": "user",
            "content": [{"type": "image", "path": str(panorama)}, {"type": "text", "text": question}],
        }
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        asked = self.processor.apply_chat_template([user], add_generation_prompt=True, **options).to(self.model.device)
        start = time.perf_counter()
        output = self.model.generate(
            **asked,
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            tokenizer=self.processor.tokenizer,
        )
        self.seconds += time.perf_counter() - start
        self.right += output.text[0].strip() == answer.strip()
        told = [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        taught = self.processor.apply_chat_template([told], return_labels=True, **options).to(self.model.device)
        targets = taught.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = self.model(**taught).logits[0, :-1].float()
        logits, targets = logits[targets != -100], targets[targets != -100]
        self.losses.append(nn.functional.cross_entropy(logits, targets, reduction="none").cpu())
        self.likeliest.append(logits.argmax(-1).cpu())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.quantization", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "build/train-demo/finetune", help="a trained folder")
    parser.add_argument("--data", type=Path, default=ROOT / "samples", help="a folder with metadata.jsonl")
    parser.add_argument("--questions", type=int, help="only the first ones")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer, at most (default: 64)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not (options.model / "config.json").is_file():
        print(f"{options.model} is left out: there is no trained model. `make train-demo` trains one")
        return
    try:
        ways = quantizers(options.device)
    except ImportError:
        print("Quantisation is left out: pip install --no-deps torchao")
        return
    processor = PanoramaProcessor.from_pretrained(options.model)
    models = {name: Asked(options.model, processor, options.device, way()) for name, way in ways.items()}
    rows = [json.loads(line) for line in (options.data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[: options.questions]
    for row in tqdm(rows, desc="questions", leave=False):
        for model in models.values():
            model.ask(options.data / row["file_name"], row["query"], row["annotation"], options.new)
    full = models["float32"]
    expected = torch.cat(full.likeliest)
    print(f"{options.model}, {len(rows)} questions; int4 in groups of {GROUP}; weights of language model and of all.\n")
    print("| | language model | all weights | right | same | loss | answers/s |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, model in models.items():
        body, whole = weights_mib(model.model.model.language_model), weights_mib(model.model)
        same = (torch.cat(model.likeliest) == expected).float().mean()
        cells = [name, f"{body:.2f} MiB", f"{whole:.2f} MiB", f"{model.right} of {len(rows)}", f"{100 * same:.1f} %"]
        cells += [f"{torch.cat(model.losses).mean():.4f}", f"{full.seconds / model.seconds:.2f} x"]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
