"""What a model is composed of, and that nothing of it is lost on the way to a folder and back."""

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaModel, PanoramaVLM, checkpoint_panorama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma3Config,
    PreTrainedModel,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration, Gemma3TextModel

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


def text_logits(model):
    """Logits of a few words, [1, 6, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 7, 9, 11, 13, 17]])).logits


@pytest.fixture
def gemma3(tower):
    """A tiny Gemma 3 that sees: what `AutoModelForCausalLM` gives of a multimodal checkpoint."""
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=tower, mm_tokens_per_image=4, tie_word_embeddings=True)
    return Gemma3ForConditionalGeneration(config).eval()


def test_of_a_vision_language_model_the_language_model_is_taken_and_comes_back_from_a_folder(gemma3, tower, tmp_path):
    expected = text_logits(gemma3)  # of 300 words
    vision = AutoModel.from_config(PanoramaConfig(vision_config=tower).vision_config)
    model = PanoramaVLM.from_vision_text_pretrained(vision, gemma3, image_token_id=300, latent_dimension=32).eval()
    assert type(model.model.language_model) is Gemma3TextModel
    torch.testing.assert_close(text_logits(model)[..., :300], expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(text_logits(PanoramaVLM.from_pretrained(tmp_path))[..., :300], expected)


def test_of_the_folder_of_a_vision_language_model_the_language_model_is_taken(gemma3, tower, tokenizer, tmp_path):
    gemma3.save_pretrained(tmp_path / "gemma3")
    tokenizer.save_pretrained(tmp_path / "gemma3")
    vision = AutoModel.from_config(PanoramaConfig(vision_config=tower).vision_config)
    model = PanoramaVLM.from_vision_text_pretrained(vision, str(tmp_path / "gemma3"), latent_dimension=32).eval()
    torch.testing.assert_close(text_logits(model)[..., :300], text_logits(gemma3))


LANGUAGES = {
    "tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "bias in the head": {"model_type": "phi"},
    "soft cap": {"model_type": "gemma2", "final_logit_softcapping": 2.0},
    "scaled": {"model_type": "granite", "logits_scaling": 8.0},
}


@pytest.mark.parametrize("unused", [0, 1])
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_placeholder_has_a_row_and_no_say(language, unused, tower, tmp_path):
    """An unused row where there is one, else one more; loss and likelihoods are those of a softmax without it."""
    torch.manual_seed(0)
    text = {name: value for name, value in TEXT.items() if name not in ("layer_types", "sliding_window")}
    bare = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**text, **LANGUAGES[language]})).eval()
    torch.nn.init.normal_(bare.get_output_embeddings().weight, std=0.5)
    expected = text_logits(bare)  # of 300 words
    token = 300 - unused
    vision = AutoModel.from_config(PanoramaConfig(vision_config=tower).vision_config)
    model = PanoramaVLM.from_vision_text_pretrained(vision, bare, image_token_id=token, latent_dimension=32).eval()
    model.save_pretrained(tmp_path)
    for composed in (model, PanoramaVLM.from_pretrained(tmp_path)):
        assert composed.config.text_config.vocab_size == len(composed.get_input_embeddings().weight) == token + 1
        logits = text_logits(composed)
        torch.testing.assert_close(logits[..., :token], expected[..., :token])
        likelihoods = expected[..., :token].log_softmax(-1)
        torch.testing.assert_close(logits.log_softmax(-1)[..., :token], likelihoods)
        ids = torch.tensor([[5, 7, 9, 11, 13, 17]])
        wanted = -likelihoods[0, :-1].gather(1, ids[0, 1:, None]).mean()
        for return_logits in (True, False):
            loss = composed(input_ids=ids, labels=ids, return_logits=return_logits).loss
            torch.testing.assert_close(loss, wanted)
            gradients = torch.autograd.grad(loss, composed.get_output_embeddings().weight)[0]
            assert torch.isfinite(gradients).all() and (language == "tied" or not gradients[token].any())
        if not unused:  # where an engine brings its own head, it is never the likeliest
            own = composed.lm_head(composed.model(input_ids=ids).last_hidden_state)
            assert (own[..., token] < own[..., :token].amax(-1)).all()


def test_a_language_model_without_a_head_is_refused(tower):
    body = AutoModel.from_config(PanoramaConfig().text_config.__class__(**{**TEXT, "layer_types": None}))
    vision = AutoModel.from_config(PanoramaConfig(vision_config=tower).vision_config)
    with pytest.raises(ValueError, match="must hold a head"):
        PanoramaVLM.from_vision_text_pretrained(vision, body, image_token_id=300, latent_dimension=32)


def test_a_language_model_whose_logits_are_not_known_is_refused_when_it_is_configured(tower):
    with pytest.raises(ValueError, match="language model of type 'bert' follow from its head is not known"):
        PanoramaConfig(tower, {"model_type": "bert"})


def test_hidden_states_of_the_headless_model_give_the_logits_through_the_head(make, ask, panoramas):
    """What tools do that fuse head and loss: `base_model`, then the output embeddings."""
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    hidden = model.base_model(**inputs)
    assert model.base_model is model.model and model.base_model_prefix == "model"
    torch.testing.assert_close(model.get_output_embeddings()(hidden.last_hidden_state), model(**inputs).logits)
    assert hidden.image_hidden_states.shape == (1, model.config.num_image_tokens, 32)


@pytest.mark.parametrize("language", ["gemma2", "granite"])
def test_a_language_model_keeps_its_own_logits(make, language):
    """Soft cap and scale stand between the head and the logits; text alone is read as by the model of transformers."""
    scale = {"gemma2": {"final_logit_softcapping": 2.0}, "granite": {"logits_scaling": 8.0}}[language]
    small = {**TEXT, "model_type": language, **scale}
    model, _ = make(language={name: value for name, value in small.items() if name != "layer_types"})
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.base_model.load_state_dict(model.model.language_model.state_dict())
    bare.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    torch.testing.assert_close(text_logits(model), text_logits(bare))


def test_the_headless_model_is_read_from_the_folder_of_the_whole(make, ask, panoramas, tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path)
    headless = PanoramaModel.from_pretrained(tmp_path)
    inputs = ask(processor, panoramas[0])
    expected = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(headless(**inputs).last_hidden_state, expected)


def test_every_auto_class_gives_the_whole_model(make, tmp_path):
    make()[0].save_pretrained(tmp_path)
    assert isinstance(AutoModelForMultimodalLM.from_pretrained(tmp_path), PanoramaVLM)
    assert "AutoModelForMultimodalLM" in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "part", ["model.resampler", "model.projection", "model.language_model.layers", "vicreg_projector"]
)
def test_a_folder_that_lacks_weights_is_refused(make, tmp_path, part):
    make()[0].save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = sorted(name for name in weights if name.startswith(part))[0]
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit PanoramaVLM.*missing: {gone}"):
        PanoramaVLM.from_pretrained(tmp_path)


def test_a_folder_with_weights_that_nobody_knows_is_refused(make, tmp_path):
    make()[0].save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.adapter.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit PanoramaVLM.*not known: model.adapter.weight"):
        PanoramaVLM.from_pretrained(tmp_path)


def test_a_projector_that_is_switched_off_is_left_out(make, ask, panoramas, tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path)
    without = PanoramaVLM.from_pretrained(tmp_path, use_vicreg_projector=False)
    assert without.vicreg_projector is None
    inputs = ask(processor, panoramas[0])
    torch.testing.assert_close(without(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_training_checkpoint_is_loaded_with_the_arguments_of_from_pretrained(make, tmp_path, lora):
    model, _ = make(use_lora=lora, lora_rank=2)
    model.set_stage("finetune")
    model.config.save_pretrained(tmp_path)
    state = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "trainer_state.json").write_text('{"files": {}, "stage": "finetune", "step": 3}')
    loaded = PanoramaVLM.from_checkpoint(tmp_path, dtype="bfloat16", attn_implementation="eager")
    assert {p.dtype for name, p in loaded.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"
    assert loaded.has_lora == lora and not loaded.training
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name].to(weight.dtype), msg=name)


@pytest.mark.parametrize("device_map", ["cuda", "cuda:1", {"": "cuda:0"}, torch.device("cuda")])
@pytest.mark.parametrize(("given", "expected"), [({}, torch.bfloat16), ({"dtype": "float32"}, torch.float32)])
def test_attention_is_chosen_by_the_precision_that_is_loaded(make, tmp_path, monkeypatch, device_map, given, expected):
    """`dtype` is "auto" where it is not given: that of the folder. What loads, for want of a GPU, is a stand-in."""
    make()[0].to(torch.bfloat16).save_pretrained(tmp_path)
    asked, loaded = [], []

    def choose(device, dtype):
        asked.append((torch.device(device).type, dtype))
        return "flash_attention_2"

    def load(path, **kwargs):
        loaded.append(kwargs.get("attn_implementation"))
        return PanoramaVLM, {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(checkpoint_panorama, "choose_attention", choose)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    PanoramaVLM.from_pretrained(tmp_path, device_map=device_map, **given)
    PanoramaVLM.from_pretrained(tmp_path, device_map=device_map, attn_implementation="eager", **given)
    assert asked == [("cuda", expected)] and loaded == ["flash_attention_2", "eager"]


def test_what_a_quantiser_keeps_beside_its_weights_is_its_own_business(make):
    """And a part that the model does not have is still refused."""
    model, _ = make()
    model.hf_quantizer = object()
    own = "model.language_model.layers.0.mlp.up_proj.weight.absmax"
    checkpoint_panorama._check_loaded(model, {"missing_keys": set(), "unexpected_keys": {own}}, "folder")
    with pytest.raises(ValueError, match="not known: model.adapter.weight"):
        checkpoint_panorama._check_loaded(
            model, {"missing_keys": set(), "unexpected_keys": {"model.adapter.weight", own}}, "folder"
        )
