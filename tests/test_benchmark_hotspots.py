"""The benchmark of hotspots counts what lies on a thing."""

import json
from collections import Counter

import pytest
from panorama_vlm.benchmarks import hotspots
from panorama_vlm.places_panorama import BFoV, NamedPlace
from panorama_vlm.synthetic.questions import Seen
from panorama_vlm.synthetic.write import World


class Oracle:
    """Points at the place of each thing, `off` degrees beside it."""

    def __init__(self, scene, off):
        self.places = {words: thing.place for thing, words in Seen(scene, hotspots.np.random.default_rng(0)).named()}
        self.off = off

    def point(self, panorama, words):
        place = self.places[words]
        return [NamedPlace(words, BFoV(place.yaw + self.off, *place[1:]))]

    def export(self, panorama, places, to):
        from panorama_vlm import exports_panorama as exports
        from panorama_vlm.reading_panorama import layout_of

        write = {"pannellum": exports.to_pannellum, "photo_sphere_viewer": exports.to_photo_sphere_viewer}[to]
        return json.loads(json.dumps(write(places, layout_of(panorama))))


def test_right_places_lie_on_their_things_and_others_are_not_counted():
    world = World(5, width=512, kinds=("grounding",))
    there, beside = Counter(), Counter()
    for number in range(4):
        scene = world.scene(number)
        there += hotspots.count(Oracle(scene, 0.0), world, number)
        beside += hotspots.count(Oracle(scene, 90.0), world, number)
    assert there["asked"] == there["right"] > 8
    assert there["pannellum"] == there["viewer"] == there["truth"] > 0.8 * there["asked"]
    assert beside["asked"] == there["asked"] and not beside["right"] and not beside["pannellum"]


def test_without_a_model_it_says_so(tmp_path, capsys):
    hotspots.main([str(tmp_path)])
    assert "There is no model in" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_counts_the_answers_of_a_model(make, tmp_path, capsys):
    for part in make():
        part.save_pretrained(tmp_path)
    hotspots.main([str(tmp_path), "--scenes", "1"])
    assert "things asked for in 1 scenes, 0 answers right" in capsys.readouterr().out
