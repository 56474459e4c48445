import numpy as np
import pytest
import torch
from panorama_vlm.benchmarks import views as benchmark
from panorama_vlm.geometry_panorama import View, ViewOptions


@pytest.mark.slow
def test_the_benchmark_prints_a_table_of_all_that_can_run_and_says_what_cannot(capfd):
    assert benchmark.main(["--sizes", "512", "--views", "32", "--repeats", "1", "--mosaics", "1"]) == 0
    printed = capfd.readouterr().out
    absent = benchmark.missing()
    for way in benchmark.WAYS:
        named = f"**{way}**" if way == benchmark.OURS else way
        assert (f"LEFT OUT: {way} (" if way in absent else f"| 512 x 256 | 32 | {named} | ") in printed
    assert "say nothing about a claim" in printed


def test_the_reference_of_an_image_whose_colour_is_its_direction_has_the_colours_of_the_rays():
    directions = View("erp").rays((256, 512))
    tiles = benchmark.reference((127.5 + 127.5 * directions).astype(np.float32), 16)
    for tile, view in zip(tiles, ViewOptions("e2p", 90.0, 0.5).plan.views, strict=True):
        rays = torch.from_numpy(view.rays((16, 16))).permute(2, 0, 1)
        assert (tile / 127.5 - 1 - rays).norm(dim=0).max() < 0.005


@pytest.mark.parametrize("way", benchmark.WAYS)
def test_every_way_gives_the_views_of_the_reference(way):
    if way in benchmark.missing():
        pytest.skip(f"{way} cannot run here")
    image = np.array(benchmark.mosaic(512, 0).resize((64, 32)).resize((1024, 512)))  # smooth: sampling alone counts
    views = benchmark.WAYS[way](image, 128)
    assert views.shape == (9, 3, 128, 128) and views.dtype == torch.float32 and views.is_contiguous()
    assert benchmark.psnr(views[1:] * 127.5 + 127.5, benchmark.reference(image, 128)) > 35


def test_claims_are_of_the_medians_on_each_core_of_memory_and_of_quality():
    job = benchmark.Job(benchmark.FILE, *benchmark.CLAIMED_FILE)
    measured = {
        (job, benchmark.OURS): benchmark.Figures(42.0, 30.0, [(14.0, 99.0), (20.0, 99.0)]),
        (job, benchmark.PY360): benchmark.Figures(26.0, 90.0, [(4.0, 4.0), (8.0, 8.0)]),
        (job, benchmark.ALIGNED): benchmark.Figures(30.0, float("nan"), []),
    }
    found = benchmark.claims(measured)
    assert [(claim.figure, claim.holds) for claim in found] == [
        (3.5, True),
        (2.5, False),
        (16.0, True),
        (12.0, False),
        (3.0, True),
    ]


def test_a_claim_that_does_not_hold_is_named_with_its_figure(capsys):
    claims = [benchmark.Claim("fast", 3.6, 3.5), benchmark.Claim("small", 1.9, 2)]
    assert not benchmark.print_claims(claims)
    assert benchmark.print_claims(claims[:1])
    printed = capsys.readouterr().out
    assert printed.count("| fast | 3.60 | 3.5 | holds |") == 2
    assert "| small | 1.90 | 2 | **FAILS** |" in printed
