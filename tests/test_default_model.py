"""The model at the root of the repository: that its weights, its files and today's code belong together."""

import json
from pathlib import Path

import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.evaluation.asking import Answerer, Asked
from panorama_vlm.evaluation.formats import read_items
from panorama_vlm.evaluation.run import judged_line
from panorama_vlm.synthetic.write import METADATA, SAMPLES, World, row_of
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("existence", "colour", "size", "direction", "what_is_in_direction", "grounding")


def test_it_answers_about_scenes_that_it_never_saw(tmp_path):
    world = World(77_001, width=512, questions=6, kinds=KINDS, backgrounds=f"{SAMPLES}:lab,park,sunset")
    with (tmp_path / METADATA).open("w", encoding="utf-8") as rows:
        for number in range(10):
            scene = world.scene(number)
            world.picture(scene).save(tmp_path / f"{number}.png")
            rows.write(json.dumps(row_of(scene, world.ask(scene), f"{number}.png")) + "\n")
    items = read_items(tmp_path).items
    model, processor = (
        PanoramaVLM.from_checkpoint(ROOT, dtype=torch.float32).eval(),
        PanoramaProcessor.from_pretrained(ROOT),
    )
    asked = [[Asked(item) for item in items[first : first + 16]] for first in range(0, len(items), 16)]
    answers = [said for batch in Answerer(model, processor, 64)(asked) for said in batch]
    right = [judged_line(Asked(item), said)["right"] for item, said in zip(items, answers, strict=True)]
    assert len(right) > 40 and sum(right) >= 0.85 * len(right)  # by the most common answers about a third


def test_its_files_are_those_that_are_saved_today_and_its_weights_complete_and_small(tmp_path):
    model, found = PanoramaVLM.from_pretrained(ROOT, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    model.save_pretrained(tmp_path)
    PanoramaProcessor.from_pretrained(ROOT).save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), name
    with safe_open(ROOT / "model.safetensors", "pt") as weights:
        sizes = {weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert sizes == {"F32", "I64"}  # whole numbers: the batches that BatchNorm has seen
    assert (ROOT / "model.safetensors").stat().st_size <= 32 * 2**20


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"]
)
def test_its_files_say_nothing_about_the_disk_it_lay_on(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert str(Path.home()) not in text and '"/' not in text
