"""What the language model is told of where a token looks: rays, yaw, rotary positions that follow the yaw, nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaVLM
from panorama_vlm.geometry_panorama import plan_rays
from panorama_vlm.language_loss_panorama import IGNORED
from panorama_vlm.tokens_panorama import image_tokens
from transformers import AutoConfig

ENCODINGS = ("rays", "yaw", "panorope", "none")


def angles(model):
    """Yaw and pitch in degrees of the tokens that the language model gets, by the conventions of the sphere alone."""
    config = model.config
    indices, _ = image_tokens(config.view_plan, config.token_grid, config.token_selection, ("none", 0), model.device)
    rays = torch.tensor(plan_rays(config.view_plan, config.token_grid)).reshape(-1, 3)[indices]
    return torch.atan2(rays[:, 0], rays[:, 2]).rad2deg(), rays[:, 1].asin().rad2deg()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_trains_answers_and_is_saved(make, panoramas, ask, tmp_path, encoding):
    model, processor = make(position_encoding=encoding)
    inputs = ask(processor, panoramas[0])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = IGNORED
    trained = model.set_stage("resampler")
    model(**inputs, labels=labels, stage="resampler").loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)
    model.eval().save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["position_encoding"] == encoding and "use_ray_code" not in said
    again = PanoramaVLM.from_pretrained(tmp_path).eval()
    answers = [m.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() for m in (model, again)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_step_with_a_cache_is_the_step_without(make, panoramas, ask, encoding):
    model, processor = make(position_encoding=encoding)
    inputs = ask(processor, panoramas[0])
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answer = model.generate(**inputs, **options)
    for step, logits in enumerate(answer.logits):
        ids = answer.sequences[:, : inputs["input_ids"].shape[1] + step]
        with torch.no_grad():
            whole = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
    plain = model.generate(**inputs, **options, use_cache=False)
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=2, do_sample=False)
    assert plain.sequences.tolist() == answer.sequences.tolist() and beams.shape[0] == 1


def test_the_yaw_code_is_that_of_panollava_at_the_yaw_of_each_token(make):
    model, _ = make(position_encoding="yaw")
    yaw, _ = angles(model)
    expected = torch.zeros(len(yaw), 32, dtype=torch.float64)
    for token, degrees in enumerate(yaw.tolist()):
        phase = math.radians(degrees) + math.pi
        for i in range(16):
            expected[token, i] = math.sin(phase / 10000 ** (2 * i / 32))
            expected[token, 16 + i] = math.cos(phase / 10000 ** (2 * i / 32))
    tokens = torch.randn(1, 9, 16, 32)
    indices, codes = model.model._image_tokens(model.device)
    torch.testing.assert_close(codes.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        shown = model.model.projection.layers(tokens.flatten(1, 2)[:, indices] + codes)
        torch.testing.assert_close(model.model.project_tokens(tokens), shown)


def test_panorope_puts_a_token_at_the_place_of_its_yaw_among_the_positions_of_its_panorama(make, panoramas, ask):
    model, processor = make(position_encoding="panorope")
    inputs = ask(processor, panoramas[0])
    ids = inputs["input_ids"]
    positions = model.model.panorama_positions(ids, 1)[0].double()
    is_image = ids[0] == model.config.image_token_id
    first, count = int(is_image.nonzero()[0]), int(is_image.sum())
    yaw, pitch = angles(model)
    column = 90 / 4 / 360  # tiles of 90 degrees and 4 tokens, in turns
    expected = first + count * ((yaw + 180) / 360 - pitch / 180 * column)
    torch.testing.assert_close(positions[is_image], expected, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(positions[~is_image], torch.arange(len(positions)).double()[~is_image])
    left_to_right = positions[is_image][yaw.argsort()]
    assert (left_to_right.diff() > -count * column).all()  # within a column by pitch


def test_panorope_stands_tokens_of_several_views_together_that_look_the_same_way(make):
    model, _ = make(position_encoding="panorope", token_selection="all", view_strategy="e2p")
    ids = torch.full((1, model.config.num_image_tokens), model.config.image_token_id)
    positions = model.model.panorama_positions(ids, 1)[0].double() / ids.shape[1]  # in turns
    yaw, _ = angles(model)
    turns = (yaw[:, None] - yaw[None]).abs() / 360
    views = torch.arange(len(yaw)) // 16
    beside = (turns < 10 / 360) & (views[:, None] != views)
    assert beside.any(1).all()
    away = (positions[:, None] - positions[None]).abs()
    column = 90 / 4 / 360
    assert (away[beside] < turns[beside] + column).all()
    assert away.max() > 0.9  # behind, at the edges of the panorama


def test_panorope_follows_padding_partial_panoramas_further_views_and_conversations(make, panoramas, ask):
    model, processor = make(position_encoding="panorope")
    prompts = ["<image> What is this?", "<image> And this, beside <image>?"]
    inputs = processor(
        images=[[panoramas[0]], [panoramas[1], panoramas[2]]], text=prompts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        together = model(**inputs).logits
        for row, (images, prompt) in enumerate(zip(([0], [1, 2]), prompts, strict=True)):
            alone = processor(images=[[panoramas[i] for i in images]], text=[prompt], return_tensors="pt")
            there = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][there], model(**alone).logits[0], rtol=1e-4, atol=1e-5)

    view_mask = torch.ones(1, 9, dtype=torch.bool)
    view_mask[:, 3:6] = False
    per_view = torch.tensor(model.config.image_tokens_per_view)
    kept = view_mask[0].repeat_interleave(per_view)
    ids = torch.full((1, int(kept.sum())), model.config.image_token_id)
    positions = model.model.panorama_positions(ids, 1, view_mask=view_mask)[0]
    whole = model.model.panorama_positions(ids.new_full((1, len(kept)), ids[0, 0]), 1)[0]
    torch.testing.assert_close(positions / len(positions), (whole / len(whole))[kept])

    further = torch.tensor([[[90.0, 0.0, 40.0]]])
    ids = ids.new_full((1, len(kept) + 16), ids[0, 0])
    places = model.model.panorama_positions(ids, 1, further_views=further)[0][-16:] / ids.shape[1]
    assert 0.75 - 20 / 360 < places.min() < 0.75 < places.max() < 0.75 + 20 / 360
    assert abs(places.mean() - 0.75) < 1e-3


def test_a_conversation_that_goes_on_from_a_cache_says_what_it_says_from_the_start(make, panoramas, ask):
    model, processor = make(position_encoding="panorope")
    inputs = ask(processor, panoramas[0])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    longer = torch.cat([first.sequences, inputs["input_ids"][:, -5:]], 1)
    cache = first.get("cache") if first.get("cache") is not None else first.past_key_values
    pixels = inputs["pixel_values"]
    fresh = model.generate(input_ids=longer, pixel_values=pixels, **options)
    continued = model.generate(input_ids=longer, pixel_values=pixels, past_key_values=cache, **options)
    assert fresh.sequences.tolist() == continued.sequences.tolist()


def test_a_file_from_before_the_option_is_understood(make, tmp_path):
    for flag, encoding in ((True, "rays"), (False, "none")):
        model, _ = make(position_encoding=encoding)
        model.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        del config["position_encoding"]
        file.write_text(json.dumps({**config, "use_ray_code": flag}))
        loaded = PanoramaVLM.from_pretrained(tmp_path)
        assert loaded.config.position_encoding == encoding and "use_ray_code" not in loaded.config.to_dict()
        for name, parameter in loaded.named_parameters():
            torch.testing.assert_close(parameter, model.get_parameter(name), rtol=0, atol=0)
        config = PanoramaConfig.from_pretrained(tmp_path, position_encoding="yaw")
        assert config.position_encoding == "yaw"
    assert PanoramaConfig(use_ray_code=False).position_encoding == "none"
    assert PanoramaConfig().position_encoding == "rays"


def test_what_cannot_be_is_refused(make, panoramas, ask):
    with pytest.raises(ValueError, match="contradict each other"):
        PanoramaConfig(position_encoding="yaw", use_ray_code=True)
    with pytest.raises(ValueError, match="position_encoding must be one of"):
        PanoramaConfig(position_encoding="spiral")
    with pytest.raises(ValueError, match="latent_dimension must be even"):
        PanoramaConfig(position_encoding="yaw", latent_dimension=33)
    with pytest.raises(ValueError, match="needs rotary positions, which text_config of type 'gpt2'"):
        PanoramaConfig(text_config=AutoConfig.for_model("gpt2"), position_encoding="panorope")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    with pytest.raises(ValueError, match=r"has three \(M-RoPE\)"):
        PanoramaConfig(text_config=AutoConfig.for_model("qwen3", rope_parameters=rope), position_encoding="panorope")
    model, processor = make(position_encoding="panorope")
    inputs = ask(processor, panoramas[0])
    embeds = torch.zeros(*inputs["input_ids"].shape, 32)
    with pytest.raises(ValueError, match="need the position_ids that panorama_positions"):
        model(inputs_embeds=embeds)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes positions that do not rise by one"):
        model(**inputs)
