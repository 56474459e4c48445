"""Out of memory while encoding views: smaller pieces, a warning, the same result."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from panorama_vlm.memory_panorama import is_out_of_memory
from torch import nn

CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "accelerator": torch.OutOfMemoryError("XPU out of memory."),
    "linux": RuntimeError(CPU),
    "windows": RuntimeError("[enforce fail at alloc_cpu.cpp:82] data. DefaultCPUAllocator: not enough memory: you"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)."),
}
OTHERS = {
    "shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
    "words": ValueError("we are out of memory."),
    "key": KeyError("out of memory"),
}


@pytest.fixture
def limited(monkeypatch):
    """`limited(model, most, error)` -> the numbers of views that the tower was given; it fails for more than `most`."""

    def limit(model, most, error=ERRORS["cuda"]):
        seen = []

        def refuse(module, args, kwargs):
            seen.append(len(kwargs["pixel_values"]))
            if seen[-1] > most:
                raise error

        model.model.vision_tower.register_forward_pre_hook(refuse, with_kwargs=True)
        return seen

    return limit


@pytest.mark.parametrize("name", ERRORS)
def test_views_are_encoded_in_smaller_pieces_with_the_same_result(make, panoramas, limited, name):
    model, processor = make()
    pixels = processor.image_processor(panoramas[:2], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixels)
        seen = limited(model, 3, ERRORS[name])
        with pytest.warns(UserWarning, match="out of memory while encoding 18 views") as caught:
            features = model.get_image_features(pixels)
        assert [str(each.message).split(": ")[1].split(",")[0] for each in caught] == [
            f"going on with {size}" for size in (9, 5, 3)
        ]
        assert seen == [18, 9, 5, 3, 3, 3, 3, 3, 3]
        torch.testing.assert_close(features.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(features.pooler_output, expected.pooler_output)
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it knows by now, and neither fails nor warns again
            torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected.pooler_output)
        assert seen == [3] * 6


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_caught(make, panoramas, limited, name):
    model, processor = make()
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt")["pixel_values"]
    seen = limited(model, 3, OTHERS[name])
    with warnings.catch_warnings(), pytest.raises(type(OTHERS[name])) as raised:
        warnings.simplefilter("error")
        model.get_image_features(pixels)
    assert raised.value is OTHERS[name] and seen == [9] and not is_out_of_memory(raised.value)


def test_what_does_not_fit_one_at_a_time_is_raised(make, panoramas, limited):
    model, processor = make()
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt")["pixel_values"]
    seen = limited(model, 0)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError) as raised:
        model.get_image_features(pixels)
    assert seen == [9, 5, 3, 2, 1]
    assert raised.value.__notes__ == ["Encoding 9 views, 1 at a time; fewer there are not. Try a smaller batch."]


@pytest.mark.parametrize("trained", ["resampler", "all"])
def test_gradients_are_the_same_and_little_is_kept_for_backward(make, panoramas, limited, trained):
    options = {"vision_trainable_blocks": "all"} if trained == "all" else {}
    model, processor = make(**options)
    model.set_stage("vision")
    plain, kept = copy.deepcopy(model), {}
    pixels = processor.image_processor(panoramas[:2], return_tensors="pt")["pixel_values"]
    limited(model, 3)

    def step(net, name):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _count(kept, name, tensor), lambda tensor: tensor):
            tokens = net.model.encode_views(pixels)
        net.overlap_loss(tokens)[0].backward()
        return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}

    with pytest.warns(UserWarning, match="out of memory"):
        gradients = step(model, "pieces")
    expected = step(plain, "whole")
    assert gradients.keys() == expected.keys() and any("resampler" in name for name in gradients)
    assert any("vision_tower" in name for name in gradients) == (trained == "all")
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)
    again = step(model, "again")  # without a failed attempt
    assert kept["again"] < kept["whole"] / 2
    assert again.keys() == expected.keys()


def _count(kept, name, tensor):
    kept[name] = kept.get(name, 0) + tensor.numel()
    return tensor


def test_generation_goes_on_with_the_same_tokens(make, ask, panoramas, limited):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    limited(model, 2)
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)


def test_weights_in_shards_are_not_run_in_pieces_because_other_processes_would_wait(make, panoramas, limited):
    model, processor = make()
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt")["pixel_values"]
    seen = limited(model, 3)
    parameter = next(model.model.vision_tower.encoder.parameters())
    for name in ("ds_id", "device_mesh"):  # of DeepSpeed's ZeRO-3, of a DTensor
        setattr(parameter, name, SimpleNamespace())
        with pytest.raises(torch.OutOfMemoryError) as raised:
            model.get_image_features(pixels)
        assert "in shards" in raised.value.__notes__[-1] and seen == [9]
        delattr(parameter, name)
        seen.clear()


def test_batch_statistics_in_training_are_not_those_of_pieces(make, panoramas, limited):
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model, processor = make(vision={**vision, "layer_type": "basic"}, image_size=64)
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt")["pixel_values"]
    limited(model, 3)
    model.train()
    with pytest.raises(torch.OutOfMemoryError) as raised:
        model.get_image_features(pixels)
    assert "BatchNorm" in raised.value.__notes__[-1]
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.model.vision_tower.modules())
    with torch.no_grad(), pytest.warns(UserWarning, match="out of memory"):
        model.eval().get_image_features(pixels)


REAL = """
import resource, sys, warnings
from pathlib import Path
import torch
from panorama_vlm import PanoramaConfig, PanoramaVLM

torch.set_num_threads(1)
torch.manual_seed(0)
tower = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 2048, "num_hidden_layers": 1,
         "num_attention_heads": 2, "image_size": 64, "patch_size": 4, "vision_use_head": False}
language = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
model = PanoramaVLM(PanoramaConfig(tower, language, latent_dimension=32)).eval()
pixels = torch.randn(4, 9, 3, 64, 64)
with torch.no_grad():
    expected = model.model.encode_views(pixels)
    size = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 100 * 2**20,) * 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = model.model.encode_views(pixels)
assert caught and "out of memory while encoding 36 views" in str(caught[0].message), caught
torch.testing.assert_close(tokens, expected)
print(model.model.in_pieces.size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_process_whose_memory_is_limited_encodes_what_it_could_not_at_once():
    run = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert 1 <= int(run.stdout) < 36


TWO = """
import copy, sys, warnings
import torch, torch.distributed as dist
from panorama_vlm import PanoramaConfig, PanoramaVLM
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
tower = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "vision_use_head": False}
language = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
torch.manual_seed(0)
model = PanoramaVLM(PanoramaConfig(tower, language, latent_dimension=32, vision_trainable_blocks="all"))
model.set_stage("vision")
plain = copy.deepcopy(model)
pixels = torch.randn(2, 9, 3, 64, 64, generator=torch.Generator().manual_seed(rank))


def refuse(module, args, kwargs):
    if len(kwargs["pixel_values"]) > 3:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def gradients(net):
    for _ in range(2):  # the second step knows the size
        net.zero_grad()
        DistributedDataParallel(net)(pixels, stage="vision").loss.backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


if rank == 1:
    model.model.vision_tower.register_forward_pre_hook(refuse, with_kwargs=True)
found, expected = gradients(model), gradients(plain)
assert model.model.in_pieces.size == (3 if rank else None) and found.keys() == expected.keys()
for name in expected:
    torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)
for layer in plain.model.vision_tower.encoder.layers:
    fully_shard(layer)
plain.model.vision_tower.register_forward_pre_hook(refuse, with_kwargs=True)
try:
    plain.model.encode_views(pixels)
except torch.OutOfMemoryError as error:
    assert "in shards" in error.__notes__[-1]
    print("done")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_of_two_processes_may_run_out_of_memory_and_gradients_are_the_same(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", TWO]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for process in both:
        out, err = process.communicate(timeout=200)
        assert out == b"done\n", err.decode()[-2000:]
