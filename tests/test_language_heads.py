"""How logits follow from the head: the table of families, each against the family's own logits."""

import pytest
import torch
from panorama_vlm.composing_panorama import language_parts
from panorama_vlm.language_loss_panorama import LANGUAGE_HEADS, logit_transform
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 90,
    "max_position_embeddings": 64,
    # by other names
    "d_model": 32,
    "n_embd": 32,
    "n_head": 2,
    "n_heads": 2,
    "n_layer": 2,
    "n_layers": 2,
    "n_positions": 64,
    "ffn_dim": 48,
    "word_embed_proj_dim": 16,
    "attention_heads": 2,
    "num_layers": 2,
    # experts, and latent attention
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    # what stands between head and logits
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "logit_scale": 0.25,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.5,
}
ATTENTION = ["full_attention", "full_attention"]
OWN = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 90, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_heads": 2},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "qwen3_5_moe_text": {"layer_types": ATTENTION},
    "qwen3_5_text": {"layer_types": ATTENTION},
    "qwen3_next": {"layer_types": ATTENTION},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
}


def small(family):
    """The configuration of a tiny model of a family, with a cap or scale that shows."""
    default = AutoConfig.for_model(family)
    derived = {name for name in SMALL if isinstance(getattr(type(default), name, None), property)}
    there = set(dir(default)) & {*default.to_dict(), *default.attribute_map}
    options = {name: value for name, value in SMALL.items() if name in there - derived}
    if isinstance(default.__dict__.get("layer_types"), list):
        options["layer_types"] = default.layer_types[:2]
    return AutoConfig.for_model(family, **{**options, "pad_token_id": None, **OWN.get(family, {})})


# Those that are only part of a vision-language model have no class of their own: `tests/test_vlm.py`.
ALONE = sorted(family for family in LANGUAGE_HEADS if not family.endswith(("_vl_text", "_vl_moe_text")))


@pytest.mark.parametrize("family", ALONE)
def test_the_logits_of_a_family_are_those_of_the_table(family):
    torch.manual_seed(0)
    config = small(family)
    causal = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    body, head = language_parts(causal)
    assert type(body) is type(AutoModel.from_config(config))
    torch.nn.init.normal_(head.weight, std=2.0)  # so large that a cap shows
    embeds = torch.randn(1, 5, body.get_input_embeddings().weight.shape[1])
    with torch.no_grad():
        expected = causal(inputs_embeds=embeds).logits
        hidden = body(inputs_embeds=embeds).last_hidden_state
        logits = logit_transform(config)(head(hidden))
        plain = head(hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert ((plain - expected).abs().max() > 0.1) == (logit_transform(config) != logit_transform(small("llama")))


@pytest.mark.parametrize("family", ALONE)
def test_a_family_answers_embeddings_as_it_answers_their_ids(family):
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(small(family), attn_implementation="eager").float().eval()
    for parameter in causal.parameters():  # what starts at zero would hide a part
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1 + parameter.std(correction=0).item())
    ids = torch.randint(3, 90, (1, 5))
    with torch.no_grad():
        expected = causal(input_ids=ids).logits
        logits = causal(inputs_embeds=causal.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_language_model_that_predicts_inputs_in_several_streams_is_refused():
    with pytest.raises(ValueError, match="gemma3n_text"):
        logit_transform(AutoConfig.for_model("gemma3n_text"))


def test_a_family_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match=r"type 'bert' follow from its head is not known.*LANGUAGE_HEADS\['bert'\]"):
        logit_transform(AutoConfig.for_model("bert"))
