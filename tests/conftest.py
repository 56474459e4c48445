"""Small models and real panoramas for all tests; nothing is downloaded."""

import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaProcessor, PanoramaVLM
from panorama_vlm.pipeline_panorama import PanoramaPipeline
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "vision_use_head": False,
}
LANGUAGE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def pytest_configure(config):
    """What transformers' own tests are marked with (`tests/transformers_tests.py`)."""
    for name in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "torch_compile_test",
        "is_pipeline_test",
    ):
        config.addinivalue_line("markers", f"{name}: of transformers")


def pytest_terminal_summary(terminalreporter, config):
    """After `make soak` one table: a test says itself what it tried, in `record_property("soak", (kind of fault, how
    many, what was lost, the longest in seconds))`, or its name and how long it took say it, and how many in
    `record_property("tried", ...)`. What failed, broke, or did not run is there, too."""
    if config.option.markexpr != "soak":
        return
    terminalreporter.section("what was tried, and what it cost")
    terminalreporter.write_line("| kind | tried | lost | longest, s |\n|---|--:|---|--:|")
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            said = dict(getattr(report, "user_properties", ()))  # a file that is skipped or broken as a whole has none
            title, _, parameter = report.nodeid.rpartition("::")[2].partition("[")
            words = title.removeprefix("test_").replace("_", " ")
            if parameter and "tried" not in said:
                words += f" ({parameter.rstrip(']')})"
            known = (words, said.get("tried", 1), "nothing", said.get("longest", getattr(report, "duration", 0.0)))
            kind, tried, lost, seconds = said.get("soak", known)
            if outcome != "passed":
                lost = "not tried" if outcome == "skipped" else "**FAILED**"
            terminalreporter.write_line(f"| {kind} | {tried:,} | {lost} | {seconds:.1f} |")


@pytest.fixture(autouse=True)
def words_of_transformers():
    """Command lines that run inside a test silence transformers for themselves, not for the next test."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


@pytest.fixture(scope="session")
def samples() -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLES / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def panoramas() -> list[Image.Image]:
    """Six of the real panoramas, 512 x 256."""
    return [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))[:6]]


@pytest.fixture(scope="session")
def tower() -> dict:
    """The config of a tiny vision tower."""
    return dict(TOWER)


@pytest.fixture(scope="session")
def language() -> dict:
    """The config of a tiny language model."""
    return dict(LANGUAGE)


@pytest.fixture
def tokenizer(samples) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sample["annotation"] for sample in samples], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")


@pytest.fixture(scope="session")
def mosaic(panoramas) -> Image.Image:
    """4,096 x 2,048 pixels with the detail of a real panorama: side by side."""
    mosaic = Image.new("RGB", (4096, 2048))
    for index in range(64):
        mosaic.paste(panoramas[5 * index % 6], (index % 8 * 512, index // 8 * 256))
    return mosaic


@pytest.fixture
def make(tokenizer):
    """`make(**options)` -> a tiny random model, with projector and VICReg, and its processor."""

    def build(vision=TOWER, language=LANGUAGE, **options):
        torch.manual_seed(0)
        own = copy.deepcopy(tokenizer)  # the processor adds <image>
        projector = {"use_vicreg_projector": True, "vicreg_projector_dim": 48}
        options = {"latent_dimension": 32, "overlap_loss": "vicreg", **projector, **options}
        config = PanoramaConfig({**vision}, {**language, "vocab_size": len(own)}, **options)
        processor = PanoramaProcessor.from_config(config, own)
        config.image_token_id = processor.image_token_id
        model = PanoramaVLM(config).eval()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model, processor

    return build


@pytest.fixture
def ask():
    """`ask(processor, panorama, question)` -> model inputs of a chat with one question."""

    def inputs(processor, panorama, question="location"):
        content = [{"type": "image", "image": panorama}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )

    return inputs


def psnr(a, b, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return 10 * np.log10(peak**2 / error)


@pytest.fixture(name="psnr")
def psnr_fixture():
    return psnr


@pytest.fixture
def pipe(make, language):
    """The pipeline of a random model that does not only say again what it said."""
    model, processor = make(language={**language, "tie_word_embeddings": False})
    return PanoramaPipeline(model, processor=processor, device="cpu")


@pytest.fixture
def said(pipe, monkeypatch):
    """`said(answer)`: the model answers what `answer(prompt)` says; what it was asked is in `said.asked`."""

    class Said:
        def __init__(self):
            self.asked = []

        def __call__(self, answer):
            def generate(input_ids, **inputs):
                prompts = pipe.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=False)
                prompts = [re.sub(r"(<image>)+|(<\|pad\|>)+", "", prompt) for prompt in prompts]
                self.asked += [SimpleNamespace(prompt=prompt, **inputs) for prompt in prompts]
                return SimpleNamespace(text=[answer(prompt) for prompt in prompts], generated_ids=input_ids[:, :2])

            monkeypatch.setattr(pipe.model, "generate", generate)

    return Said()
