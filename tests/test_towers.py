"""Towers of convolutions: their last feature map is the grid of tokens."""

from __future__ import annotations

import pytest
import torch
from panorama_vlm import PanoramaConfig
from panorama_vlm.towers_panorama import tower_of
from panorama_vlm.train.build import batch_statistics

CONVOLUTIONAL = {
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    },
    "convnextv2": {"model_type": "convnextv2", "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "num_stages": 3},
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "num_stages": 3},
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_tokens_are_the_cells_of_the_last_feature_map_in_reading_order(make, panoramas, name):
    model, processor = make(vision=CONVOLUTIONAL[name], image_size=64)
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model.model.tower_tokens(pixels)
        maps = model.model.vision_tower(pixel_values=pixels[0]).last_hidden_state
    assert model.config.vision_grid == (4, 4) and tokens.shape == (1, 9, 16, 24)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(tokens[0, :, 4 * row + column], maps[:, :, row, column])


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_token_depends_most_on_its_own_cell(make, name):
    model, _ = make(vision=CONVOLUTIONAL[name], image_size=64)
    images = torch.rand(1, 1, 3, 64, 64, requires_grad=True)
    for token in (0, 6, 13):
        images.grad = None
        model.model.tower_tokens(images)[0, 0, token].square().sum().backward()
        cells = images.grad[0, 0].abs().sum(0).unflatten(1, (4, 16)).unflatten(0, (4, 16)).sum((1, 3))
        assert int(cells.argmax()) == token


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_whole_tower_trains_and_what_no_token_depends_on_does_not(make, panoramas, name):
    model, processor = make(vision=CONVOLUTIONAL[name], image_size=64, vision_trainable_blocks="all")
    trained = model.set_stage("vision")
    pixels = processor.image_processor(panoramas[:2], return_tensors="pt")["pixel_values"]
    model(pixels, stage="vision").loss.backward()
    tower = {n: p for n, p in model.named_parameters() if "vision_tower" in n}
    assert {n for n in trained if "vision_tower" in n} == {n for n, p in tower.items() if p.grad is not None}


def test_sizes_that_do_not_fit_are_named():
    vision = CONVOLUTIONAL["resnet"]
    with pytest.raises(ValueError, match="image_size must say which"):
        PanoramaConfig(vision)
    with pytest.raises(ValueError, match="a multiple of 16, .* got 72"):
        PanoramaConfig(vision, image_size=72)
    assert (
        tower_of(PanoramaConfig(vision, image_size=64).vision_config).width(
            PanoramaConfig(vision, image_size=64).vision_config
        )
        == 24
    )


def test_it_is_saved_and_loaded_and_answers(make, panoramas, tmp_path):
    model, processor = make(vision=CONVOLUTIONAL["resnet"], image_size=64)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    messages = [
        {"role": "user", "content": [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "Hm?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    first, second = (m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, again))
    assert first.tolist() == second.tolist()


def test_a_number_of_blocks_is_refused_where_there_is_no_list_of_them(make):
    model, _ = make(vision=CONVOLUTIONAL["resnet"], image_size=64, vision_trainable_blocks=1)
    with pytest.raises(ValueError, match="must be 'all', or at most the tower's 0 blocks, got 1"):
        model.set_stage("vision")


def test_batch_statistics_that_train_are_said_and_frozen_ones_not(make):
    model, _ = make(vision=CONVOLUTIONAL["resnet"], image_size=64, vision_trainable_blocks="all")
    model.set_stage("vision")
    (words,) = batch_statistics(model)
    assert "BatchNorm" in words and not batch_statistics(make()[0])
    model.set_stage("finetune")
    assert not batch_statistics(model)
