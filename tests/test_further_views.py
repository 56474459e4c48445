"""Views beside those of the plan: a closer look at a part of a panorama."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from panorama_vlm.data.augmentation import Augmentation
from panorama_vlm.data.collators import ConversationCollator
from panorama_vlm.data.rows import conversation
from panorama_vlm.geometry_panorama import View, ray_code
from PIL import Image


def asked(panorama, *views):
    part = {"type": "image", "image": panorama, **({"further_views": list(views)} if views else {})}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is there?"}]}]


def inputs_of(processor, *conversations):
    return processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def test_a_further_view_that_the_plan_has_gives_the_features_of_the_plans(make, panoramas):
    model, processor = make(token_selection="all", view_strategy="e2p")
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt", further_views=[[(45.0, 0.0, 90.0)]])
    assert pixels["pixel_values"].shape[1] == 9 and pixels["further_views"].tolist() == [[[45.0, 0.0, 90.0]]]
    torch.testing.assert_close(pixels["pixel_values"][:, 8], pixels["pixel_values"][:, 1])
    with torch.no_grad():
        (features,) = model.get_image_features(**pixels).pooler_output
        plain = model.get_image_features(pixels["pixel_values"][:, :8]).pooler_output[0]
    size = len(plain) // 8
    torch.testing.assert_close(features[: len(plain)], plain)
    torch.testing.assert_close(features[len(plain) :], plain[size : 2 * size])


def test_its_tokens_have_the_codes_of_their_rays(make, panoramas):
    model, processor = make()
    views = [[(10.0, 20.0, 30.0), (-100.0, -45.0, 50.0)]]
    pixels = processor.image_processor(panoramas[:1], return_tensors="pt", further_views=views)
    seen = {}
    model.model.projection.register_forward_hook(lambda module, given, out: seen.update(codes=given[1]))
    with torch.no_grad():
        model.get_image_features(**pixels)
    for number, (yaw, pitch, fov) in enumerate(views[0]):
        rays = View("perspective", yaw, pitch, fov).rays(model.config.token_grid).reshape(-1, 3)
        expected = torch.tensor(ray_code(rays, model.config.ray_frequencies), dtype=torch.float32)
        torch.testing.assert_close(seen["codes"][0, number], expected)


def test_chats_with_and_without_are_one_batch_and_answer_as_alone(make, panoramas):
    model, processor = make()
    closer = asked(panoramas[0], (30, -10, 40), (120, 0, 35))
    plain = asked(panoramas[1])
    both = inputs_of(processor, closer, plain)
    placeholders = (both["input_ids"] == processor.image_token_id).sum(1).tolist()
    each = model.config.num_image_tokens
    assert placeholders == [each + 2 * model.config.tokens_per_view, each]
    assert both["further_views"][1].isnan().all()
    together = model.generate(**both, max_new_tokens=5, do_sample=False)[:, -5:]
    for number, messages in enumerate((closer, plain)):
        alone = model.generate(**inputs_of(processor, messages), max_new_tokens=5, do_sample=False)[:, -5:]
        assert alone[0].tolist() == together[number].tolist()
    with torch.no_grad():
        without = model(**inputs_of(processor, plain)).logits[0, -1]
        near = model(**inputs_of(processor, asked(panoramas[1], (0, 0, 30)))).logits[0, -1]
    assert not torch.allclose(without, near)


def test_training_samples_see_one_somewhere_and_always_the_same(make, panoramas):
    model, processor = make()
    raw = [{**_sample(panoramas[number]), "index": number} for number in range(4)]
    collate = ConversationCollator(processor, further_view=0.5, seed=3)
    batch = collate([dict(_copied(each)) for each in raw])
    again = collate([dict(_copied(each)) for each in raw])
    there = batch["further_views"][..., 0].isfinite()
    assert 0 < int(there.sum()) < 4
    torch.testing.assert_close(batch["further_views"], again["further_views"], equal_nan=True)
    fields = batch["further_views"][..., 2][there]
    assert (30 <= fields).all() and (fields <= 60).all()
    model.set_stage("finetune")
    output = model(**batch)
    output.loss.backward()
    assert math.isfinite(float(output.loss))
    packed = ConversationCollator(processor, further_view=1.0, independent=1.0)([_copied(raw[0])])
    assert packed["further_views"].shape == (1, 1, 3)
    assert math.isfinite(float(model(**packed).loss))


@pytest.mark.parametrize(
    ("words", "turns", "low", "high"), [("[93, 22, 11, 11]", "place", 0.4, 0.75), ("up", "same", 0, 0.2)]
)
def test_half_of_them_show_a_place_that_the_sample_names_however_it_is_turned(make, words, turns, low, high):
    """Of a grey panorama with a white square at a place the further view shows the square, or any direction."""
    _, processor = make()
    pixels = np.full((256, 512, 3), 90, np.uint8)
    pixels[88:104, 380:396] = 255  # yaw 92.8, pitch 22.5
    known = {"turns": [turns], "mirrors": [turns], "questions": ["Where is it?"], "options": [[]]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": words}]}
    seen = []
    for index in range(80):
        messages = [*conversation(Image.fromarray(pixels), "Where is it?", "so")[:1], answer]
        raw = {"messages": messages, "known": known, "index": index}
        augmentation = Augmentation(turn=0.5, mirror=0.5)
        collate = ConversationCollator(processor, further_view=1.0, augmentation=augmentation)
        view = collate([raw])["pixel_values"][0, -1]
        seen.append(bool(view.max() - view.min() > 1))
    assert low <= np.mean(seen) <= high  # by chance one of 30 to 60 degrees shows it in one of twenty


def _sample(panorama):
    return {"messages": conversation(panorama, "What is there?", "A park.")}


def _copied(raw):
    messages = [{**each, "content": [dict(part) for part in each["content"]]} for each in raw["messages"]]
    return {**raw, "messages": messages}


@pytest.mark.parametrize("view", [(0, 100, 40), (0, 0, 180), (0, 0), "front", (math.nan, 0, 40)])
def test_a_view_that_cannot_be_is_refused(make, panoramas, view):
    _, processor = make()
    with pytest.raises(ValueError, match="a further view must be"):
        processor.image_processor(panoramas[:1], return_tensors="pt", further_views=[[view]])


def test_a_list_for_each_panorama_is_needed(make, panoramas):
    _, processor = make()
    with pytest.raises(ValueError, match="a list for each panorama, got 1 for 2"):
        processor.image_processor(panoramas[:2], return_tensors="pt", further_views=[[(0, 0, 40)]])


def test_without_the_ray_code_nothing_says_where_a_token_looks(make, panoramas):
    model, processor = make(position_encoding="none")
    with_code, _ = make()
    assert model.model.projection.ray is None and with_code.model.projection.ray is not None
    tokens = torch.rand(1, 1, 16, 32).expand(1, 9, 16, 32)
    with torch.no_grad():
        same, different = (m.model.project_tokens(tokens) for m in (model, with_code))
    assert len(same[0].unique(dim=0)) == 16 and len(different[0].unique(dim=0)) == same.shape[1]
