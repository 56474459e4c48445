"""The benchmarks of where an answer looked and of looking twice."""

import math

import numpy as np
import pytest
from panorama_vlm.benchmarks import look_twice, saliency
from panorama_vlm.geometry_panorama import View
from panorama_vlm.places_panorama import great_circle
from panorama_vlm.synthetic.write import World


def test_small_things_are_asked_for_by_words_that_fit_them_alone():
    found = look_twice.questions(World(7, 256))
    for _, (picture, words, answer, what, place) in zip(range(6), found, strict=False):
        width = place.x_fov * math.cos(math.radians(place.pitch))
        assert 2 < min(width, place.y_fov) < 6 and picture.size == (256, 128)
        assert words in (f"What colour is the {what}?", f"What shape is the {what}?")
        assert answer not in words.split()


def test_the_brightest_directions_are_those_of_marks_and_apart():
    rays, heat = View("erp").rays((90, 180)), np.zeros((90, 180))
    marks = [(100.0, 20.0, 3.0), (-179.0, 0.0, 2.0), (10.0, -60.0, 1.0)]
    for yaw, pitch, height in marks:
        heat[rays @ View("perspective", yaw, pitch, 90).rays((1, 1))[0, 0] > math.cos(math.radians(8))] = height
    found = look_twice.brightest(heat, 3)
    for mark, place in zip(marks, found, strict=True):
        assert great_circle(mark[:2], place) < 9
    assert heat.max() == 3  # as it was


@pytest.mark.parametrize("benchmark", [look_twice, saliency])
def test_without_a_model_they_say_so(benchmark, tmp_path, capsys):
    benchmark.main([str(tmp_path)])
    assert "There is no model in" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [look_twice, saliency])
def test_the_commands_print_a_table_for_a_model(benchmark, make, tmp_path, capsys):
    for part in make():
        part.save_pretrained(tmp_path)
    benchmark.main([str(tmp_path), "--questions", "1"])
    out = capsys.readouterr().out
    assert "by chance" in out and "1 questions" in out
    assert len(out.splitlines()) in (8, 9)
