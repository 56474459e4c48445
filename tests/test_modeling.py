import logging

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaVLM, TrainingStageOutput, VisionStageOutput, checkpoint_panorama
from panorama_vlm.checkpoint_panorama import choose_attention
from panorama_vlm.stages_panorama import PARTS, TRAINED_PARTS, part_of
from panorama_vlm.towers_panorama import tower_of
from transformers import AutoModelForCausalLM, GenerationConfig

TOWERS = {
    "siglip": {"model_type": "siglip_vision_model", "patch_size": 16, "vision_use_head": False},
    "siglip2": {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 16, "vision_use_head": False},
    "clip": {"model_type": "clip_vision_model", "patch_size": 16, "image_size": 64, "projection_dim": 16},
    "dinov2": {"model_type": "dinov2", "patch_size": 16, "image_size": 64, "mlp_ratio": 2},
    "dinov2_with_registers": {
        "model_type": "dinov2_with_registers",
        "patch_size": 16,
        "image_size": 64,
        "num_register_tokens": 3,
    },
    "vit": {"model_type": "vit", "patch_size": 16, "image_size": 64},
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LANGUAGES = {
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64},
}


def bare_language_model(model):
    """The language model of transformers with the weights of ours."""
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.base_model.load_state_dict(model.model.language_model.state_dict())
    bare.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    bare.generation_config = model.generation_config
    return bare


@pytest.mark.parametrize("tower", TOWERS)
def test_any_tower_with_a_patch_grid_gives_its_patch_tokens_and_no_others(make, ask, panoramas, tower):
    vision = {**SMALL, "image_size": 64, **TOWERS[tower]}
    if tower == "siglip2":
        del vision["image_size"]
    model, processor = make(vision=vision)
    inputs = ask(processor, panoramas[0])
    seen = []
    model.model.resampler.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        output = model(**inputs)
        hidden = tower_of(model.config.vision_config).hidden_states(model.model.vision_tower, inputs["pixel_values"][0])
    assert seen[0].shape == (9, 16, 32)  # 4 x 4 patches of each of 9 views
    torch.testing.assert_close(seen[0], hidden[:, -16:])
    assert output.logits.shape[:2] == inputs["input_ids"].shape


def test_siglip2_is_fed_the_patches_that_its_own_image_processor_makes(make, panoramas):
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    model, processor = make(vision={**SMALL, **TOWERS["siglip2"]})
    image = processor(images=panoramas[0], return_tensors="pt")["pixel_values"][0, :1]
    fed = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["pixel_values"]), with_kwargs=True
    )
    tower_of(model.config.vision_config)(model.model.vision_tower, image)
    theirs = convert_image_to_patches(image[0].numpy(), 16)
    torch.testing.assert_close(fed[0][0], torch.tensor(theirs))


@pytest.mark.parametrize("language", LANGUAGES)
def test_any_language_model_of_transformers_answers(make, ask, panoramas, language):
    model, processor = make(language={**SMALL, **LANGUAGES[language]})
    inputs = ask(processor, panoramas[0])
    sequences = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert sequences.shape[1] <= inputs["input_ids"].shape[1] + 4


def test_image_features_hold_the_layers_of_the_tower_where_they_are_asked_for(make, panoramas):
    model, processor = make()
    pixels = processor(images=panoramas[:2], return_tensors="pt")["pixel_values"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        features = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
        expected = model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True, output_attentions=True)
        plain = model.get_image_features(pixels)
    torch.testing.assert_close(features.hidden_states, expected.hidden_states)
    torch.testing.assert_close(features.attentions, expected.attentions)
    assert plain.hidden_states is None and plain.attentions is None
    torch.testing.assert_close(features.pooler_output, plain.pooler_output)
    torch.testing.assert_close(model.get_image_features(pixels, return_dict=False), plain.to_tuple())


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"resampler_type": "mlp"}, 16),
        ({"resampler_type": "avg_pool", "resampler_pool": 2}, 4),
        ({"resampler_type": "perceiver", "resampler_queries": 4, "resampler_heads": 2}, 4),
    ],
)
def test_every_resampler_trains_in_every_stage(make, panoramas, options, tokens):
    model, processor = make(use_lora=False, **options)
    features = model.get_image_features(processor(images=panoramas[:2], return_tensors="pt")["pixel_values"])
    assert features.last_hidden_state.shape == (2, 9, tokens, 32)
    assert features.pooler_output.shape == (2, model.config.num_image_tokens, 32)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "sky"}]},
        {"role": "assistant", "content": "Blue."},
    ]
    batch = processor.apply_chat_template([messages], return_labels=True)
    for stage in ("vision", "resampler", "finetune"):
        trained = set(model.set_stage(stage))
        model.zero_grad()
        model(**batch, stage=stage).loss.backward()
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert {name for name in with_gradient if "resampler" in name}
        assert with_gradient <= trained


def test_a_pooled_token_holds_the_mean_of_its_block(make):
    model, _ = make(resampler_type="avg_pool", resampler_pool=2)
    tokens = torch.randn(1, 16, 32)
    blocks = tokens.view(1, 2, 2, 2, 2, 32).mean((2, 4)).view(1, 4, 32)
    torch.testing.assert_close(model.model.resampler(tokens), model.model.resampler.layers(blocks))


def test_the_table_of_stages_says_what_trains(make):
    model, _ = make(use_lora=False, finetune_vision_tower=True, vision_trainable_blocks=1)
    parts = {
        "vision": {"vision_tower", "resampler", "vicreg_projector"},
        "resampler": {"resampler", "projection"},
        "finetune": {"vision_tower", "resampler", "projection", "language_model"},
    }
    assert set(parts) == set(TRAINED_PARTS)
    for stage, expected in parts.items():
        trained = model.set_stage(stage)
        assert {part_of(name) for name in trained} == expected
        assert sorted(trained) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    blocks = {name.split(".layers.")[1][0] for name in model.set_stage("vision") if "vision_tower" in name}
    assert blocks == {"1"}
    model, _ = make(vision_trainable_blocks="all", resampler_vision_tower=True, resampler_language_model=True)
    every = {part: {n for n, _ in model.named_parameters() if part_of(n) == part} for part in PARTS}
    tower, rest = every["vision_tower"], every["resampler"]
    assert set(model.set_stage("vision")) == tower | rest | every["vicreg_projector"]
    assert set(model.set_stage("resampler")) == tower | rest | every["projection"] | every["language_model"]
    assert model.model.vision_tower.training and model.model.language_model.training
    finetuned = {part_of(name) for name in model.set_stage("finetune")}
    assert finetuned == {"resampler", "projection", "language_model"} and not model.model.vision_tower.training
    with pytest.raises(ValueError, match="stage must be one of"):
        model.set_stage("warmup")


@pytest.mark.parametrize("stage", ["vision", "resampler", "finetune"])
@pytest.mark.parametrize("tower", TOWERS)
def test_what_no_token_depends_on_is_known_and_does_not_train(make, panoramas, tower, stage):
    """Processes that wait for all gradients would wait for it forever."""
    vision = {**SMALL, "image_size": 64, **TOWERS[tower], "vision_use_head": True, "use_mask_token": True}
    if tower == "siglip2":
        del vision["image_size"]
    trains = {"vision_trainable_blocks": "all", "resampler_vision_tower": True, "finetune_vision_tower": True}
    model, processor = make(vision=vision, use_lora=False, **trains)
    trained = model.set_stage(stage)
    pixels = processor(images=panoramas[0], return_tensors="pt")["pixel_values"]
    parameters = dict(model.model.vision_tower.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    model.model.tower_tokens(pixels).sum().backward()
    without = {name for name, parameter in parameters.items() if parameter.grad is None}
    assert without == {name for name in parameters if f"model.vision_tower.{name}" not in trained}
    assert without


def test_frozen_parts_are_in_evaluation_mode_and_trained_parts_are_not(make):
    model, _ = make()
    model.train()
    model.set_stage("vision")
    assert (
        model.model.resampler.training
        and not model.model.vision_tower.training
        and not model.model.language_model.training
    )


def test_the_vision_stage_does_not_run_the_language_model(make, panoramas, monkeypatch):
    model, processor = make()
    monkeypatch.setattr(model.model.language_model, "forward", lambda *a, **k: pytest.fail("the language model ran"))
    output = model(processor(images=panoramas[:2], return_tensors="pt")["pixel_values"], stage="vision")
    assert isinstance(output, VisionStageOutput)
    weights = model.config
    expected = (
        weights.vicreg_similarity_weight * output.invariance
        + weights.vicreg_variance_weight * output.variance
        + weights.vicreg_covariance_weight * output.covariance
    )
    torch.testing.assert_close(output.vicreg_raw, expected)
    torch.testing.assert_close(output["loss"], weights.vicreg_loss_weight * output.vicreg_raw)
    assert output.loss is output.vicreg_loss and output.vicreg_dim == 48 and output.vicreg_weight == 1.0


def test_a_joint_weight_adds_the_overlap_loss_to_the_later_stages(make, ask, panoramas):
    model, processor = make(overlap_loss_weight_finetune=0.1)
    inputs = ask(processor, panoramas[0])
    output = model(**inputs, labels=inputs["input_ids"].clone().fill_(5))
    assert isinstance(output, TrainingStageOutput)
    alone = model(inputs["pixel_values"], stage="vision").vicreg_raw
    torch.testing.assert_close(output.overlap_loss, alone)
    torch.testing.assert_close(output.loss, output.ar_loss + 0.1 * alone)


def test_without_a_projector_the_resampled_tokens_are_compared(make, panoramas):
    model, processor = make(use_vicreg_projector=False)
    assert model(processor(images=panoramas[0], return_tensors="pt")["pixel_values"], stage="vision").vicreg_dim == 32


def test_matched_features_are_the_same_ray_of_an_image_of_directions(make):
    """Features that are the ray itself: what is matched must agree, up to bilinear interpolation on a 16 x 16 grid."""
    from panorama_vlm.geometry_panorama import plan_rays

    model, _ = make(vision={**SMALL, **TOWERS["siglip"], "image_size": 256})
    rays = torch.tensor(plan_rays(model.model.view_plan, model.model.token_grid), dtype=torch.float32)[
        None
    ]  # [1, V, S, 3]
    for matched in model.overlap.match(rays):
        apart = torch.rad2deg((matched.x - matched.y).norm(dim=-1))
        assert apart.max() < 0.3  # a token is 5.6 degrees wide; strips are 6.65 apart on average


def test_matched_features_in_half_precision_are_interpolated_in_float32(make):
    """Four tokens that are exact in bfloat16: their mean is to be exact, too."""
    model, _ = make(vision={**SMALL, **TOWERS["siglip"], "image_size": 256})
    features = torch.randn(1, 9, 256, 8).bfloat16()
    for half, full in zip(model.overlap.match(features), model.overlap.match(features.float()), strict=True):
        assert half.y.dtype == torch.float32
        torch.testing.assert_close(half.y, full.y, rtol=0, atol=0)


def test_every_weight_of_the_projector_learns(make, panoramas):
    """VICReg does not see a bias of the last layer: its gradient would be rounding alone."""
    model, processor = make(vicreg_projector_depth=3)
    model.set_stage("vision")
    model(processor(images=panoramas[:2], return_tensors="pt")["pixel_values"], stage="vision").loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in model.vicreg_projector.named_parameters()}
    assert min(gradients.values()) > 1e-4 * max(gradients.values()), gradients


def test_a_model_that_answered_in_inference_mode_can_be_trained(make, ask, panoramas):
    model, processor = make(fov_deg=77.0)  # a plan that no other test uses
    inputs = ask(processor, panoramas[0])
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2)
        model(inputs["pixel_values"], stage="vision")
    for stage in ("vision", "finetune"):
        model.set_stage(stage)
        model(**inputs, labels=inputs["input_ids"] % 500, stage=stage).loss.backward()


def test_the_same_batch_gives_the_loss_of_its_panoramas(make, panoramas):
    model, processor = make()
    pixels = processor(images=panoramas[:3], return_tensors="pt")["pixel_values"]
    together = model(pixels, stage="vision").loss
    alone = torch.stack([model(pixels[i : i + 1], stage="vision").loss for i in range(3)]).mean()
    torch.testing.assert_close(together, alone)


def test_a_plan_without_rays_falls_back_to_strips_with_a_warning(make, panoramas):
    model, processor = make()
    pixels = processor(images=panoramas[0], return_tensors="pt")["pixel_values"]
    with pytest.warns(UserWarning, match="3 views and the plan 9: falling back to sequential VICReg mode"):
        assert model(pixels[:, :3], stage="vision").loss > 0
    strips, _ = make(use_anyres_e2p_vicreg=False)
    assert strips(pixels, stage="vision").loss != model(pixels, stage="vision").loss


def test_one_view_is_too_few_for_the_vision_stage(make, panoramas):
    model, processor = make(view_strategy="resize")
    with pytest.raises(ValueError, match="VICReg requires at least 2 views, got 1"):
        model(processor(images=panoramas[0], return_tensors="pt")["pixel_values"], stage="vision")


def test_an_overlap_too_small_for_any_match_is_an_error(make, panoramas):
    model, processor = make(vision={**SMALL, **TOWERS["siglip"], "image_size": 32}, overlap_ratio=0.01)
    with pytest.raises(ValueError, match="no token looks the same way .* overlap_ratio=0.01"):
        model(processor(images=panoramas[0], return_tensors="pt")["pixel_values"], stage="vision")


def test_features_that_are_not_finite_are_an_error_that_names_the_step(make, panoramas):
    model, processor = make()
    pixels = processor(images=panoramas[0], return_tensors="pt")["pixel_values"]
    pixels[0, 3, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="stage 'vision'"):
        model(pixels, stage="vision")


def test_grids_of_tokens_need_not_be_square(make, ask, panoramas):
    model, processor = make(vision={**SMALL, "model_type": "vit", "patch_size": [16, 8], "image_size": 64})
    assert model.config.token_grid == (4, 8)
    inputs = ask(processor, panoramas[0])
    assert model(inputs["pixel_values"], stage="vision").loss > 0
    assert model(**inputs).image_hidden_states.shape == (1, model.config.num_image_tokens, 32)


def test_the_vision_stage_in_bfloat16_says_what_it_says_in_float32(make, panoramas):
    model, processor = make()
    pixels = processor(images=panoramas[:2], return_tensors="pt")["pixel_values"]
    expected = model(pixels, stage="vision")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels, stage="vision")
    assert output.invariance.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.02, atol=0)
    output = model.to(torch.bfloat16)(pixels, stage="vision")
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "options", [{"vicreg_mode": "batchwise"}, {"overlap_loss": "densecl"}, {"pitch_rows": [-30, 30]}]
)
def test_every_overlap_loss_trains_the_resampler(make, panoramas, options):
    model, processor = make(overlap_pairs=["neighbours", "global"], **options)
    model.set_stage("vision")
    output = model(processor(images=panoramas[:2], return_tensors="pt")["pixel_values"], stage="vision")
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.model.resampler.parameters())
    assert (output.covariance is None) == (options.get("overlap_loss") == "densecl")


STRATEGIES = ["anyres_e2p", "e2p", "anyres_tiles", "tiles", "cubemap", "sliding_window", "resize"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_view_strategy_answers_and_trains_where_its_views_overlap(make, ask, panoramas, strategy):
    model, processor = make(view_strategy=strategy, pole_caps=True)
    inputs = ask(processor, panoramas[0])
    assert inputs["pixel_values"].shape[1] == model.config.num_views
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    if strategy in ("anyres_tiles", "tiles", "cubemap", "resize"):
        with pytest.raises(ValueError, match="do not overlap|at least 2 views"):
            model(inputs["pixel_values"], stage="vision")
    else:
        assert model(inputs["pixel_values"], stage="vision").loss > 0


def test_metrics_tell_matched_tokens_from_random_ones(make):
    """Features that are the direction itself agree where tokens are matched; constant ones have collapsed."""
    from panorama_vlm.geometry_panorama import plan_rays

    model, _ = make(vision={**SMALL, **TOWERS["siglip"], "image_size": 128}, pitch_rows=[-30, 0, 30])
    rays = torch.tensor(plan_rays(model.model.view_plan, model.model.token_grid), dtype=torch.float32)[None]
    metrics = model.overlap.metrics(rays.repeat(2, 1, 1, 1))
    assert metrics["cosine_matched"] > 0.999 > metrics["cosine_random"]
    assert metrics["retrieval"] > 0.9
    collapsed = model.overlap.metrics(torch.ones_like(rays))
    assert collapsed["feature_std"] == 0 and collapsed["effective_rank"] == pytest.approx(1)


@pytest.mark.parametrize("stage", ["vision", "finetune"])
def test_views_that_do_not_match_the_config_are_an_error_that_names_both(make, ask, panoramas, stage):
    model, processor = make(vision_stage_expected_views=9)
    inputs = ask(processor, panoramas[0])
    inputs["pixel_values"] = inputs["pixel_values"][:, :4]
    with pytest.raises(ValueError, match="4 views a panorama, but the configuration has 9"):
        model(**inputs, stage=stage)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 9, 3, 64, 64)])
def test_pixels_of_a_wrong_rank_are_an_error_that_names_the_shape(make, shape):
    model, _ = make()
    for call in (lambda p: model(p, stage="vision"), lambda p: model.generate(p, torch.zeros(1, 4, dtype=torch.long))):
        with pytest.raises(
            ValueError, match=r"pixel_values must have 4 dimensions .* got the shape \[" + str(shape[0])
        ):
            call(torch.zeros(shape))


def test_views_of_a_wrong_size_are_an_error(make):
    model, _ = make()
    with pytest.raises(ValueError, match=r"each view must be \[3, 64, 64\].*got \[3, 32, 32\]"):
        model(torch.zeros(1, 9, 3, 32, 32), stage="vision")


def test_one_view_may_come_without_its_dimension(make, ask, panoramas):
    model, processor = make(view_strategy="resize")
    inputs = ask(processor, panoramas[0])
    with_views = model(**inputs).logits
    inputs["pixel_values"] = inputs["pixel_values"][:, 0]
    assert inputs["pixel_values"].ndim == 4
    torch.testing.assert_close(model(**inputs).logits, with_views)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_placeholders_that_do_not_fit_the_panoramas_are_an_error_that_names_both(make, ask, panoramas):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"2 panoramas need 160 <image> tokens \(80 each\), but input_ids holds 80"):
        model(**inputs)


def test_each_answer_of_a_left_padded_batch_equals_the_one_given_alone(make, panoramas):
    model, processor = make()
    questions = ["sky", "What stands to the right of the camera, and what behind it?", "Where is the sun?"]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": panorama}, {"type": "text", "text": question}]}]
        for panorama, question in zip(panoramas[:3], questions, strict=True)
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    together = model.generate(
        **processor.apply_chat_template(chats, **options), max_new_tokens=8, return_dict_in_generate=True
    )
    for row, messages in enumerate(chats):
        alone = model.generate(
            **processor.apply_chat_template(messages, **options), max_new_tokens=8, return_dict_in_generate=True
        )
        torch.testing.assert_close(together.generated_ids[row : row + 1], alone.generated_ids)


def test_generation_equals_a_plain_greedy_loop_without_cache(make, ask, panoramas):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    ids = inputs["input_ids"]
    for _ in range(6):
        logits = model(inputs["pixel_values"], ids, torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    generated = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(generated, ids)


def test_generate_returns_what_was_asked_for(make, ask, panoramas, tokenizer):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    output = model.generate(
        **inputs, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, tokenizer=tokenizer
    )
    length = inputs["input_ids"].shape[1]
    torch.testing.assert_close(output.generated_ids, output.sequences[:, length:])
    assert output.text == tokenizer.batch_decode(output.generated_ids, skip_special_tokens=True)
    assert len(output.scores) == output.generated_ids.shape[1]
    assert model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True).text is None


def test_beams_samples_and_penalties_work_though_the_placeholder_lies_outside_the_vocabulary(make, ask, panoramas):
    model, processor = make()
    assert processor.image_token_id >= model.config.text_config.vocab_size
    inputs = ask(processor, panoramas[0])
    beams = model.generate(**inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False)
    assert beams.shape[0] == 2
    assert (beams == processor.image_token_id).sum() == 2 * 80
    sampled = model.generate(**inputs, max_new_tokens=3, do_sample=True, repetition_penalty=1.3, temperature=0.7)
    torch.testing.assert_close(sampled[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize("said_in", ["arguments", "generation_config"])
@pytest.mark.parametrize("whole_processor", [False, True])
def test_generation_ends_with_a_stop_string(make, ask, panoramas, said_in, whole_processor):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    length = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, max_new_tokens=8)[0, length:]
    words = [processor.decode(generated[:end]) for end in range(1, 9)]
    said = {"stop_strings": words[0]}
    if said_in == "generation_config":
        said = {"generation_config": GenerationConfig(**said, max_new_tokens=8)}
    stopped = model.generate(
        **inputs, **said, max_new_tokens=8, tokenizer=processor if whole_processor else processor.tokenizer
    )
    assert torch.equal(stopped[0, length:], generated[:1])


def test_a_placeholder_whose_id_the_language_model_has_is_never_generated(make, ask, panoramas):
    """Vocabularies are padded (Qwen3's is): the id behind the last token then has an embedding and a logit."""
    model, processor = make()
    model.resize_token_embeddings(processor.image_token_id + 9)
    model.config.text_config.vocab_size = processor.image_token_id + 9
    with torch.no_grad():  # the placeholder is what it likes best
        model.lm_head.weight[processor.image_token_id] = 100 * model.lm_head.weight.abs().mean(0)
        model.lm_head.weight[: processor.image_token_id] *= 0
    inputs = ask(processor, panoramas[0])
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}):
        sequences = model.generate(**inputs, max_new_tokens=4, eos_token_id=None, **options)
        new = sequences[:, inputs["input_ids"].shape[1] :]
        assert new.shape[1] == 4 and (new != processor.image_token_id).all()


def test_placeholders_are_counted_once_an_answer(make, ask, panoramas, monkeypatch):
    """To count them at every token would make a GPU wait for each."""
    model, processor = make()
    counted = []
    count = type(model.model).get_placeholder_mask
    monkeypatch.setattr(type(model.model), "get_placeholder_mask", lambda *a: counted.append(1) or count(*a))
    model.generate(**ask(processor, panoramas[0]), max_new_tokens=6, min_new_tokens=6)
    assert len(counted) == 1


def test_placeholders_without_panoramas_are_an_error(make, ask, panoramas):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="0 panoramas need 0 <image> tokens .* but input_ids holds 80"):
            call(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="pixel_values take the place of <image> tokens in input_ids"):
        model(inputs["pixel_values"], inputs_embeds=torch.zeros(1, 4, 32))


@pytest.mark.parametrize("wrong", [[[1, 2]], "a.jpg", 3])
def test_generate_refuses_what_is_no_tensor_and_names_its_type(make, wrong):
    model, _ = make()
    with pytest.raises(TypeError, match=f"pixel_values must be a torch.Tensor, got {type(wrong).__name__}"):
        model.generate(wrong, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TypeError, match=f"input_ids must be a torch.Tensor, got {type(wrong).__name__}"):
        model.generate(None, wrong)


@pytest.mark.parametrize("count", [0, -1])
def test_max_new_tokens_must_be_positive(make, ask, panoramas, count):
    model, processor = make()
    with pytest.raises(ValueError, match=f"max_new_tokens must be positive, got {count}"):
        model.generate(**ask(processor, panoramas[0]), max_new_tokens=count)


@pytest.mark.parametrize(("temperature", "clamped"), [(0.01, 0.1), (2.0, 1.0)])
def test_temperature_is_clamped_with_a_warning(make, ask, panoramas, temperature, clamped):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    with pytest.warns(UserWarning, match=f"temperature {temperature} is outside .* clamped to {clamped}"):
        torch.manual_seed(0)
        outside = model.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=temperature)
    torch.manual_seed(0)
    inside = model.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=clamped)
    torch.testing.assert_close(outside, inside)


def test_without_a_question_generate_asks_the_default_prompt_with_a_warning(make, panoramas, tokenizer):
    model, processor = make(default_generation_prompt="Describe the light.")
    pixels = processor(images=panoramas[:2], return_tensors="pt")["pixel_values"]
    with pytest.warns(UserWarning, match="asking the default prompt 'Describe the light.'"):
        sequences = model.generate(pixels, max_new_tokens=2, tokenizer=tokenizer)
    assert "Describe the light." in tokenizer.decode(sequences[1])
    with pytest.raises(ValueError, match="generate needs input_ids"):
        model.generate(pixels, max_new_tokens=2)


def test_text_alone_is_answered_as_by_the_language_model(make, tokenizer):
    model, processor = make()
    inputs = processor(text=["hello there", "sky"], return_tensors="pt")
    bare = bare_language_model(model).generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=1)
    torch.testing.assert_close(model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=1), bare)


def test_all_tokens_reach_the_language_model_where_it_is_asked_for(make, ask, panoramas):
    model, processor = make(token_selection="all")
    output = model(**ask(processor, panoramas[0]))
    assert output.image_hidden_states.shape == (1, 9 * 16, 32)


def test_tuples_and_hidden_states_come_where_they_are_asked_for(make, ask, panoramas):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert model(**inputs, logits_to_keep=1).logits.shape[1] == 1


def test_gradient_checkpointing_changes_memory_and_not_gradients(make, ask, panoramas):
    gradients = []
    for checkpointing in (False, True):
        model, processor = make(use_lora=False)
        model.set_stage("finetune")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.language_model.is_gradient_checkpointing
        inputs = ask(processor, panoramas[0])
        model(**inputs, labels=inputs["input_ids"] % 500).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_tied_weights_stay_tied(make):
    model, _ = make()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_one_lora_step_changes_only_lora_resampler_and_projection(make, ask, panoramas):
    model, processor = make(lora_rank=4)
    model.set_stage("finetune")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = ask(processor, panoramas[0])
    model(**inputs, labels=inputs["input_ids"] % 500).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    kinds = {"lora" if "lora_" in name else part_of(name) for name in changed}
    assert kinds == {"lora", "resampler", "projection"}


def test_a_saved_lora_model_is_the_merged_one_and_the_model_keeps_its_adapters(make, ask, panoramas, tmp_path):
    model, processor = make(lora_rank=4)
    model.set_stage("finetune")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    inputs = ask(processor, panoramas[0])
    model.save_pretrained(tmp_path)
    assert model.has_lora
    loaded = PanoramaVLM.from_pretrained(tmp_path)
    assert not loaded.has_lora
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    model.merge_lora()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("installed", "disabled", "device", "dtype", "expected"),
    [
        (True, False, "cuda", torch.bfloat16, "flash_attention_2"),
        (True, False, "cuda:1", torch.float16, "flash_attention_2"),
        (True, False, 0, torch.float16, "flash_attention_2"),
        (True, True, "cuda", torch.bfloat16, "sdpa"),
        (True, False, "cuda", torch.float32, "sdpa"),
        (True, False, "cpu", torch.bfloat16, "sdpa"),
        (True, False, None, None, "sdpa"),
        (False, False, "cuda", torch.bfloat16, "sdpa"),
    ],
)
def test_flash_attention_is_chosen_on_cuda_in_half_precision_and_can_be_forbidden(
    monkeypatch, installed, disabled, device, dtype, expected
):
    monkeypatch.setattr(checkpoint_panorama, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(torch, "device", _device_without_cuda(torch.device))
    monkeypatch.setenv("DISABLE_FLASH_ATTN", "1" if disabled else "0")
    assert choose_attention(device, dtype) == expected


def _device_without_cuda(real):
    """`torch.device(0)` means CUDA only where there is a CUDA device."""
    return lambda device: real("cuda", device) if isinstance(device, int) else real(device)


def test_without_flash_attention_a_log_line_says_how_to_install_it(monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_panorama, "is_flash_attn_2_available", lambda: False)
    with caplog.at_level(logging.INFO):
        choose_attention("cuda", torch.float16)
    assert "pip install flash-attn" in caplog.text


def test_composing_keeps_the_weights_of_both_models(make):
    donor, processor = make()
    vision, language = donor.model.vision_tower, bare_language_model(donor)
    before = {n: p.clone() for n, p in [*vision.named_parameters(), *language.base_model.named_parameters()]}
    model = PanoramaVLM.from_vision_text_pretrained(
        vision, language, image_token_id=processor.image_token_id, latent_dimension=32, resampler_type="mlp"
    )
    for name, parameter in [
        *model.model.vision_tower.named_parameters(),
        *model.model.language_model.named_parameters(),
    ]:
        assert torch.equal(parameter[: len(before[name])], before[name]), name
        assert len(parameter) - len(before[name]) == (name == "embed_tokens.weight")  # the row of <image>
    assert vision.config._attn_implementation == language.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="image_token_id must be given"):
        PanoramaVLM.from_vision_text_pretrained(vision, language)


def test_composing_from_folders_takes_weights_tokenizer_and_generation_config(make, tokenizer, tmp_path):
    from panorama_vlm import PanoramaProcessor

    donor, _ = make()
    donor.model.vision_tower.save_pretrained(tmp_path / "vision")
    language = bare_language_model(donor)
    language.generation_config.eos_token_id = 7
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    paths = str(tmp_path / "vision"), str(tmp_path / "language")
    with pytest.warns(UserWarning, match="has no image processor"):
        processor = PanoramaProcessor.from_vision_text_pretrained(*paths)
    model = PanoramaVLM.from_vision_text_pretrained(*paths)
    assert model.config.image_token_id == processor.image_token_id
    names = model.config.vision_name, model.config.language_model_name
    assert names == ("vision", "language")  # a saved model says nothing about the disk
    assert model.generation_config.eos_token_id == 7
    for name, parameter in language.base_model.named_parameters():
        torch.testing.assert_close(model.model.language_model.get_parameter(name)[: len(parameter)], parameter)


def test_the_language_model_reads_inputs_embeds_too(make, ask, panoramas):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = model.model.embed(inputs["input_ids"], features)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=inputs["input_ids"], inputs_embeds=embeds)


@pytest.mark.slow
def test_both_kinds_of_stage_compile_without_a_graph_break(make, ask, panoramas):
    model, processor = make()
    inputs = dict(ask(processor, panoramas[0]))
    expected = model(**inputs).logits, model(inputs["pixel_values"], stage="vision").loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(inputs["pixel_values"], stage="vision").loss, expected[1])


def test_a_bare_config_gives_a_model_with_random_weights():
    config = PanoramaConfig(
        {**SMALL, **TOWERS["siglip"], "image_size": 32},
        {**SMALL, **LANGUAGES["llama"], "vocab_size": 50},
        latent_dimension=16,
        image_token_id=50,
    )
    model = PanoramaVLM(config)
    ids = torch.tensor([[50] * config.num_image_tokens + [1, 2, 3]])
    assert model(torch.zeros(1, 9, 3, 32, 32), ids).logits.isfinite().all()
