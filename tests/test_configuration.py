import json
import warnings

import pytest
from panorama_vlm import PanoramaConfig, PanoramaVLM
from transformers import CLIPConfig, Dinov2Config, LlamaConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_ratio": 1.5}, r"^overlap_ratio must be in \(0, 1\), got 1.5. Typical range: \[0.3, 0.7\]$"),
        ({"overlap_ratio": 0.0}, r"overlap_ratio must be in \(0, 1\), got 0.0"),
        ({"vision_trainable_blocks": "some"}, "vision_trainable_blocks must be .* at least 0, or 'all', got 'some'"),
        ({"vision_trainable_blocks": -1}, "vision_trainable_blocks must be .* at least 0, or 'all', got -1"),
        ({"vision_trainable_blocks": True}, "vision_trainable_blocks must be .* at least 0, or 'all', got True"),
        ({"resampler_vision_tower": "all"}, "resampler_vision_tower must be true or false, got 'all'"),
        ({"resampler_language_model": 1}, "resampler_language_model must be true or false, got 1"),
        ({"finetune_vision_tower": "yes"}, "finetune_vision_tower must be true or false, got 'yes'"),
        ({"vicreg_projector_dim": 0}, "^vicreg_projector_dim must be positive, got 0"),
        ({"vicreg_projector_dim": -3}, "^vicreg_projector_dim must be positive, got -3"),
        ({"vicreg_projector_depth": 0}, "vicreg_projector_depth must be positive, got 0"),
        ({"latent_dimension": 0}, "latent_dimension must be positive"),
        ({"fov_deg": 180.0}, r"fov_deg must be in \(0, 180\), got 180.0"),
        ({"pitch_rows": []}, "pitch_rows must be different degrees"),
        ({"pitch_rows": [0, 100]}, "pitch_rows must be different degrees"),
        ({"resampler_type": "linear"}, "resampler_type must be one of .*'mlp'.*, got 'linear'"),
        ({"view_strategy": "mosaic"}, "view_strategy must be one of"),
        ({"token_selection": "some"}, "token_selection must be one of"),
        ({"vicreg_mode": "global"}, "vicreg_mode must be one of"),
        ({"overlap_loss": "mse"}, "overlap_loss must be one of"),
        ({"overlap_pairs": []}, "overlap_pairs must name at least one"),
        ({"vision_token_fallback_position": "middle"}, "vision_token_fallback_position must be one of"),
        ({"vicreg_loss_weight": -1.0}, "vicreg_loss_weight must be at least 0"),
        ({"vicreg_gamma": 0}, "vicreg_gamma must be positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_rank": 0}, "lora_rank must be positive"),
        ({"max_text_length": 0}, "max_text_length must be positive"),
        ({"resampler_type": "avg_pool", "resampler_pool": 3}, "resampler_pool must divide .* 16 x 16"),
        ({"resampler_type": "perceiver", "resampler_queries": 60}, "resampler_queries must be a square number"),
        ({"resampler_type": "perceiver", "resampler_heads": 7}, "resampler_heads must divide"),
        ({"vision_config": {"hidden_size": 4}}, "needs its 'model_type'"),
        ({"vision_config": {"model_type": "llama"}}, "must cut its image into a grid of patches"),
    ],
)
def test_what_is_wrong_is_found_on_construction(options, message):
    with pytest.raises(ValueError, match=message):
        PanoramaConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_stage_expected_views": 1}, "VICReg requires at least 2 views"),
        ({"vicreg_projector_dim": 48}, "vicreg_projector_dim=48 has no effect"),
        ({"view_strategy": "resize", "use_anyres_e2p_vicreg": True}, "falling back to sequential VICReg mode"),
    ],
)
def test_what_is_doubtful_is_warned_of(options, message):
    with pytest.warns(UserWarning, match=message):
        PanoramaConfig(**options)


def test_a_vision_stage_without_a_loss_is_warned_of_where_it_is_set_and_not_where_labels_are_taught(make, recwarn):
    """The configuration said so of stages that teach labels, and of those that come later."""
    model, _ = make(vicreg_loss_weight=0.0)
    model.set_stage("resampler")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="vicreg_loss_weight is 0.0 and no token labels are taught: vision stage"):
        model.set_stage("vision")
    model.add_label_head({"thing": 3})
    model.set_stage("vision")
    make(vicreg_loss_weight=0.0, view_strategy="cubemap")  # whose faces have nothing in common
    assert not [w for w in recwarn if "vision" in str(w.message)]


def test_tokens_too_coarse_for_what_tiles_own_are_warned_of_and_refused_where_none_is_left():
    """Of a grid of 2 x 2 on eight tiles of 90 degrees every middle is nearer to a neighbour's."""
    coarse = {"resampler_type": "avg_pool", "resampler_pool": 8}
    with pytest.raises(ValueError, match=r"token_selection='owned' on a grid of \(2, 2\) tokens leaves 100%"):
        PanoramaConfig(view_strategy="e2p", **coarse)
    with pytest.warns(UserWarning, match=r"leaves 100% .* Use token_selection='all'"):
        assert PanoramaConfig(**coarse).num_image_tokens == 4  # of the global view
    assert PanoramaConfig(view_strategy="e2p", token_selection="all", **coarse).num_image_tokens == 32


@pytest.mark.parametrize("loss", ["densecl", "vicreg"])
def test_pairs_of_a_single_token_are_no_pairs(loss):
    """On one token a view there is nothing to tell a match from; it was an error at the first step."""
    options = {"resampler_type": "avg_pool", "resampler_pool": 16, "token_selection": "all", "overlap_ratio": 0.8}
    with pytest.warns(UserWarning, match=f"overlap_loss='{loss}' compares at least 2 tokens a pair|no token looks"):
        config = PanoramaConfig(overlap_loss=loss, **options)
    assert config.overlap_problem
    with pytest.warns(UserWarning, match="strips of a grid of 1 x 1 tokens have one"):
        assert PanoramaConfig(overlap_loss=loss, use_anyres_e2p_vicreg=False, **options).overlap_problem
    batchwise = PanoramaConfig(overlap_loss="vicreg", vicreg_mode="batchwise", use_anyres_e2p_vicreg=False, **options)
    assert not batchwise.overlap_problem


def test_the_defaults_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PanoramaConfig()
        PanoramaConfig(view_strategy="resize")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("fov", "fov_deg"),
        ("fov_degree", "fov_deg"),
        ("overlap", "overlap_ratio"),
        ("overlap_ration", "overlap_ratio"),
        ("pitch", "pitch_rows"),
        ("latent_dim", "latent_dimension"),
        ("resampler_typ", "resampler_type"),
        ("vicreg_projector_dims", "vicreg_projector_dim"),
        ("temperature", "densecl_temperature"),
    ],
)
def test_an_option_that_does_not_exist_is_answered_with_the_one_that_was_meant(wrong, meant):
    with pytest.raises(ValueError, match=f"unknown option '{wrong}' of PanoramaConfig, did you mean '{meant}'"):
        PanoramaConfig(**{wrong: 1})


def test_an_option_like_no_other_is_answered_with_all_of_them():
    with pytest.raises(ValueError, match="unknown option 'zzz' of PanoramaConfig; its options are view_strategy, .*"):
        PanoramaConfig(zzz=1)


@pytest.mark.parametrize("derived", ["num_views", "num_image_tokens", "view_plan"])
def test_what_follows_from_other_options_cannot_be_given(derived):
    with pytest.raises(ValueError, match=f"^{derived} cannot be set: it follows from other options") as raised:
        PanoramaConfig(**{derived: 4})
    assert len(str(raised.value)) < 200


def test_a_file_with_keys_of_others_is_read_with_a_warning_and_keeps_them(tmp_path):
    PanoramaConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "made_by": "a converter", "newer_option": [1]}))
    with pytest.warns(UserWarning, match="holds made_by, newer_option, not known here") as caught:
        loaded = PanoramaConfig.from_pretrained(tmp_path)
        PanoramaConfig.from_pretrained(tmp_path)
    assert len([warning for warning in caught if "not known here" in str(warning.message)]) == 1
    loaded.save_pretrained(tmp_path)
    saved = json.loads(file.read_text())
    assert saved["made_by"] == "a converter" and saved["newer_option"] == [1]


def test_tokens_are_compared_themselves_and_contrastively_unless_a_file_says_otherwise(tmp_path):
    """`docs/overlap.md`; what older folders were trained with, they name."""
    config = PanoramaConfig()
    assert (config.overlap_loss, config.densecl_temperature, config.use_vicreg_projector) == ("densecl", 0.07, False)
    assert config.pairs_by_rays and config.resampler_skip
    PanoramaConfig(overlap_loss="vicreg", use_vicreg_projector=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["overlap_loss"] == "vicreg" and written["use_vicreg_projector"] and written["resampler_skip"]
    loaded = PanoramaConfig.from_pretrained(tmp_path)
    assert (loaded.overlap_loss, loaded.use_vicreg_projector) == ("vicreg", True)


def test_options_beside_a_file_are_checked_as_any(tmp_path):
    PanoramaConfig().save_pretrained(tmp_path)
    assert PanoramaConfig.from_pretrained(tmp_path, fov_deg=60).num_views == 13
    with pytest.raises(ValueError, match=r"overlap_ratio must be in \(0, 1\), got 1.5"):
        PanoramaConfig.from_pretrained(tmp_path, overlap_ratio=1.5)


def test_a_misspelt_option_beside_a_model_is_an_error(make, tmp_path):
    make()[0].save_pretrained(tmp_path)
    assert PanoramaVLM.from_pretrained(tmp_path, vicreg_loss_weight=2.0).config.vicreg_loss_weight == 2.0
    with pytest.raises(ValueError, match="unknown option 'fov' of PanoramaConfig, did you mean 'fov_deg'"):
        PanoramaVLM.from_pretrained(tmp_path, fov=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_anyres_e2p_vicreg": False, "pole_caps": True}, "has a row of a single view"),
        ({"use_anyres_e2p_vicreg": False, "view_strategy": "cubemap"}, "has a row of a single view"),
        ({"view_strategy": "e2p", "overlap_pairs": ["global"]}, "view_strategy='e2p' has none"),
        ({"view_strategy": "cubemap", "overlap_loss_weight_finetune": 0.1}, "meet at their edges and do not overlap"),
    ],
)
def test_an_overlap_loss_that_the_views_cannot_have_is_refused_on_construction(options, message):
    with pytest.raises(ValueError, match=message):
        PanoramaConfig(**options)


def test_views_that_do_not_overlap_are_named_as_the_reason_and_serve_other_stages(make, tmp_path):
    with pytest.warns(UserWarning, match="stage 'vision' cannot train: the views of view_strategy='cubemap' meet"):
        model, _ = make(view_strategy="cubemap")
    with pytest.raises(ValueError, match="stage 'vision' cannot train: the views of view_strategy='cubemap' meet"):
        model.set_stage("vision")
    model.set_stage("resampler")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said when it was made
        PanoramaVLM.from_pretrained(tmp_path)


def test_options_of_transformers_itself_pass():
    assert PanoramaConfig(output_hidden_states=True).output_hidden_states


def test_json_round_trip(tmp_path):
    config = PanoramaConfig(
        vision_config=Dinov2Config(image_size=112, num_hidden_layers=2),
        text_config=LlamaConfig(num_hidden_layers=1, vocab_size=99),
        pitch_rows=(-30, 30),
        resampler_type="avg_pool",
        lora_target_modules=("q_proj", "v_proj"),
        system_prompt="Look around.",
        image_token_id=100,
    )
    config.save_pretrained(tmp_path)
    loaded = PanoramaConfig.from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    ours.pop("_name_or_path", None), theirs.pop("_name_or_path", None)  # where it was loaded from
    assert theirs == ours
    assert isinstance(loaded.vision_config, Dinov2Config)
    assert isinstance(loaded.text_config, LlamaConfig)
    assert loaded.view_plan == config.view_plan


def test_a_configuration_is_made_again_of_its_dict():
    config = PanoramaConfig(fov_deg=70.0)
    assert PanoramaConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_a_part_of_a_sub_config_beside_a_file_leaves_the_rest_as_it_is(tmp_path):
    PanoramaConfig(text_config={"model_type": "llama", "hidden_size": 64}).save_pretrained(tmp_path)
    text = PanoramaConfig.from_pretrained(tmp_path, text_config={"vocab_size": 20}).text_config
    assert (text.model_type, text.hidden_size, text.vocab_size) == ("llama", 64, 20)


def test_sub_configs_may_be_dicts_objects_or_two_tower_configs():
    assert PanoramaConfig(vision_config={"model_type": "dinov2", "image_size": 224}).image_size == 224
    assert PanoramaConfig(vision_config=CLIPConfig()).vision_config.model_type == "clip_vision_model"


def test_derived_values_of_the_defaults():
    config = PanoramaConfig()
    assert config.num_views == 9
    assert config.vision_grid == config.token_grid == (16, 16)
    assert config.tokens_per_view == 256
    assert config.num_image_tokens == 256 + 768
    assert PanoramaConfig(token_selection="all").num_image_tokens == 9 * 256
    assert PanoramaConfig(resampler_type="avg_pool").tokens_per_view == 64
    assert PanoramaConfig(resampler_type="perceiver", resampler_queries=16).token_grid == (4, 4)
    assert PanoramaConfig(view_strategy="resize").num_image_tokens == 256


def test_derived_values_cannot_be_set():
    with pytest.raises(AttributeError):
        PanoramaConfig().num_views = 3
