"""The language model quantised, the rest whole: through `quantization_config`, as users of transformers do it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from panorama_vlm import PanoramaVLM
from panorama_vlm.benchmarks import quantization
from panorama_vlm.checkpoint_panorama import WHOLE_PARTS, quantized_alone
from torch import nn
from transformers import BitsAndBytesConfig, QuantoConfig
from transformers.quantizers.quantizers_utils import should_convert_module


def test_what_a_configuration_does_not_say_is_that_only_the_language_model_is_quantised(make):
    config = QuantoConfig(weights="int8")
    filled = quantized_alone(config)
    assert filled.modules_to_not_convert == [*WHOLE_PARTS] and config.modules_to_not_convert is None
    assert quantized_alone(config.to_dict()).modules_to_not_convert == [*WHOLE_PARTS]
    assert quantized_alone(BitsAndBytesConfig(load_in_8bit=True)).llm_int8_skip_modules == [*WHOLE_PARTS]
    own = QuantoConfig(weights="int8", modules_to_not_convert=["lm_head"])
    assert quantized_alone(own) is own
    model, _ = make()
    for net in (model, model.model):
        linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
        converted = {name for name in linear if should_convert_module(name, [*WHOLE_PARTS])}
        assert converted == {name for name in linear if "language_model." in name} and len(converted) == 14


def int8_written_out(weight):
    """The nearest of 256 steps that cover each row [rows, columns] on both sides of zero."""
    step = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight * (1 / step)).round().clamp(-128, 127) * step  # the greatest is a tie


def int4_written_out(weight, group=32):
    """The nearest of 16 values between the least and the greatest of each group of columns."""
    groups = weight.unflatten(1, (-1, group))
    least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (most - least) / 15
    return (((groups - least) / step).round() * step + least).flatten(1)


@pytest.mark.tools
@pytest.mark.parametrize(("name", "written_out"), [("int8", int8_written_out), ("int4", int4_written_out)])
def test_answers_are_those_of_weights_rounded_by_the_formula(make, ask, panoramas, tmp_path, name, written_out):
    pytest.importorskip("torchao")
    model, processor = make()
    model.save_pretrained(tmp_path)
    options = quantization.quantizers("cpu")[f"float32, {name}"]()
    loaded = PanoramaVLM.from_pretrained(tmp_path, **options).eval()
    assert options["quantization_config"].modules_to_not_convert is None
    kinds = {name: type(parameter.data) for name, parameter in loaded.named_parameters()}
    rounded = copy.deepcopy(model)
    for part, module in rounded.model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            assert kinds.pop(f"model.language_model.{part}.weight") is not torch.Tensor
            module.weight.data = written_out(module.weight.data)
    assert set(kinds.values()) == {torch.Tensor}
    inputs = ask(processor, panoramas[0])
    with torch.no_grad():
        logits, expected, full = (net(**inputs).logits for net in (loaded, rounded, model))
    torch.testing.assert_close(logits, expected)
    assert (expected - full).abs().max() > 1e-3
    bodies = [net.model.language_model for net in (model, loaded)]
    whole, part = map(quantization.weights_mib, bodies)
    assert part < whole


FRESH = """
import json, sys
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, TorchAoConfig

folder, image = sys.argv[1:3]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": image}, {"type": "text", "text": "location"}]
options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
model = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
)
model.save_pretrained(folder + "/int8")
again = AutoModelForImageTextToText.from_pretrained(folder + "/int8", trust_remote_code=True)
answers = [net.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -8:].tolist() for net in (model, again)]
kinds = [
    sorted({name.split(".")[1] for name, weight in net.named_parameters() if "Int8" in type(weight.data).__name__})
    for net in (model, again)
]
assert "panorama_vlm" not in sys.modules
print(json.dumps({"answers": answers, "kinds": kinds}))
"""


@pytest.mark.tools
@pytest.mark.slow
def test_a_saved_folder_is_quantised_saved_and_loaded_without_the_package(make, panoramas, tmp_path):
    pytest.importorskip("torchao")
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    panoramas[0].save(tmp_path / "panorama.png")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model"), str(tmp_path / "panorama.png")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["answers"][0] == found["answers"][1] and found["kinds"] == [["language_model"]] * 2


@pytest.mark.tools
def test_the_benchmark_counts_what_is_right_and_what_lies_in_memory(make, tmp_path, capsys):
    pytest.importorskip("torchao")
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    quantization.main(["--model", str(tmp_path), "--questions", "1", "--new", "2", "--threads", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6 and all(row[3] == "0 of 1" for row in rows) and rows[0][4] == "100.0 %"
    assert rows[0][1] == f"{sum(p.numel() for p in model.model.language_model.parameters()) * 4 / 2**20:.2f} MiB"


def test_the_benchmark_says_what_it_lacks(tmp_path, capsys):
    quantization.main(["--model", str(tmp_path), "--threads", "1"])
    assert "there is no trained model" in capsys.readouterr().out
