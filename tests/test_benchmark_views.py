import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from panorama_vlm.benchmarks import views as benchmark
from panorama_vlm.geometry_panorama import View


@pytest.mark.slow
def test_the_benchmark_runs_and_prints_its_tables():
    command = [sys.executable, "-m", "panorama_vlm.benchmarks.views", "--smoke"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| 512 x 256 | 32 | ours, sampled by torch |" in result.stdout
    assert "as the bare decode, one core:" in result.stdout
    for module, package in benchmark.PACKAGES.items():
        if module in benchmark.missing():
            assert f"{package} cannot be imported" in result.stdout


def test_the_reference_of_an_image_whose_colour_is_its_direction_has_the_colours_of_the_rays():
    directions = View("erp").rays((256, 512))
    views = benchmark.reference((127.5 + 127.5 * directions).astype(np.float32), 16)
    for index, view in enumerate(benchmark.PLAN.views):
        rays = torch.from_numpy(view.rays((16, 16))).permute(2, 0, 1)
        apart = (views[index] / 127.5 - 1 - rays).norm(dim=0)
        assert apart.max() < (0.05 if view.is_global else 0.005)  # the mean of many directions is shorter than one


@pytest.mark.parametrize("way", [way for way in benchmark.WAYS if way != benchmark.DECODE])
def test_every_way_gives_the_views_of_the_reference(way):
    if benchmark.NEEDS.get(way) in benchmark.missing():
        pytest.skip(f"{benchmark.NEEDS[way]} is not installed")
    image = np.array(
        benchmark.mosaic(512, 0).resize((64, 32)).resize((1024, 512))
    )  # smooth: sampling is all that counts
    views = benchmark.WAYS[way](image, 128)
    assert views.shape == (9, 3, 128, 128) and views.dtype == torch.float32 and views.is_contiguous()
    assert benchmark.psnr(views * 127.5 + 127.5, benchmark.reference(image, 128)) > 35


def test_the_mean_over_areas_counts_the_parts_of_cells():
    assert np.allclose(benchmark.area_mean(np.array([0.0, 3.0, 6.0]), 2), [1.0, 5.0])


def test_a_claim_that_does_not_hold_is_named_with_its_figure(capsys):
    claims = [benchmark.Claim("fast", 3.6, 3.5), benchmark.Claim("small", 1.9, 2)]
    assert not benchmark.print_claims(claims)
    assert benchmark.print_claims(claims[:1])
    assert capsys.readouterr().err == "claim fails: small: 1.90, must be at least 2\n"
