"""The main job on a small scale: compose, train the three stages, save, load elsewhere, ask.

`make train-demo` (`python -m panorama_vlm.demo.quickstart --output build/train-demo`) takes a minute or two on two
cores and needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, SiglipVisionConfig

from ..modeling_panorama import PanoramaVLM
from ..pictures import draw_views
from ..processing_panorama import PanoramaProcessor

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count())]


def train_tokenizer(samples: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the sample texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sample[key] for sample in samples for key in ("query", "annotation")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")


def compose(folder: Path, samples: list[dict[str, str]]) -> PanoramaProcessor:
    """Save a small model with random weights and its processor."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(samples)
    vision = AutoModel.from_config(
        SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            vision_use_head=False,
        )
    )
    language = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    options: dict[str, Any] = {"latent_dimension": 128, "use_lora": False}
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    model = PanoramaVLM.from_vision_text_pretrained(
        vision, language, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **options
    )
    processor = PanoramaProcessor.from_config(model.config, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.demo.quickstart", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/train-demo"), help="folder for everything it makes")
    output = parser.parse_args(arguments).output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    lines = (SAMPLES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]

    processor = compose(output / "start", samples)
    first = Image.open(SAMPLES / samples[0]["file_name"])
    draw_views(first, processor.image_processor.view_plan).savefig(output / "views.png")
    print(f"The views of {samples[0]['file_name']}: {output / 'views.png'}")

    command = ["-m", "panorama_vlm.train", "quickstart.yaml", "--model", str(output / "start"), "--output", str(output)]
    print(f"\n$ accelerate launch {' '.join(command)}", flush=True)
    subprocess.run([*LAUNCH, *command], check=True)
    model = output / "finetune"

    answers_file = output / "answers.json"
    print("\nA new process loads the folder with trust_remote_code=True, without the package, and answers:", flush=True)
    ask = Path(__file__).with_name("ask.py").resolve()
    paths = [str(path.resolve()) for path in (model, SAMPLES, answers_file)]
    subprocess.run([sys.executable, str(ask), *paths], check=True, cwd=output, env={**os.environ, "PYTHONPATH": ""})

    answers = json.loads(answers_file.read_text(encoding="utf-8"))
    for answer in answers:
        print(f"\n{answer['panorama']}: {answer['question']}")
        print(f"  expected  {answer['expected']}\n  answer    {answer['answer']}")
    right = sum(answer["answer"] == answer["expected"] for answer in answers)
    print(f"\n{right} of {len(answers)} answers are word for word what was trained. These are the trained questions:")
    print("that they are answered shows that all parts work together, not that the model understands panoramas.")
    print(f"Model: {model}  answers: {answers_file}  views: {output / 'views.png'}")


if __name__ == "__main__":
    main()
