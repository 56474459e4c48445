"""The benchmark of search draws examples that show something, and counts what is found."""

import pytest

pytest.importorskip("lancedb")

import numpy as np
from panorama_vlm.benchmarks import search
from panorama_vlm.geometry_panorama import View

pytestmark = pytest.mark.tools


def test_angles_are_those_of_the_sphere():
    assert search.angle((0, 80), (180, 80)) == pytest.approx(20)
    assert search.angle((179, 0), (-179, 0)) == pytest.approx(2)


def test_examples_show_things():
    things = np.full((180, 360), -1)
    things[80:100, 260:280] = 0  # 20 degrees wide around a yaw of 90
    for seed in range(5):
        direction = search.draw(things, np.random.default_rng(seed))
        right = np.array([1.0, 0.0, 0.0])
        assert View("perspective", *direction).rotation[:, 2] @ right > np.cos(np.radians(45 * 2**0.5 + 15))


def test_it_prints_recall_and_degrees(capsys, tmp_path, make):
    model, processor = make(view_strategy="e2p", fov_deg=90)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    search.main([str(tmp_path), "--scenes", "3", "--queries", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert " tokens of 3 panoramas" in lines[0]
    assert [line.split("  ")[0] for line in lines[2::3]] == ["index of tower tokens", "mean-pooled views"]
    search.main([str(tmp_path / "none")])
    assert "There is no model" in capsys.readouterr().out
