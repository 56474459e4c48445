"""Models made from pretrained vision-language models: shown what the source would show, and everything behind."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.vlm_panorama import FAMILIES, NEWLINE
from transformers import AutoConfig, AutoModelForImageTextToText

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
CLIP = {"model_type": "clip_vision_model", **VISION}
TEXT = {
    "vocab_size": 620,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN = {"model_type": "qwen2", **TEXT}
LLAMA = {"model_type": "llama", **TEXT}
# What is special of a family: its configuration, and its control tokens.
SOURCES = {
    "llava": ({"vision_config": CLIP, "text_config": LLAMA}, ["<image>"]),
    "llava_next": ({"vision_config": CLIP, "text_config": LLAMA}, ["<image>"]),
    "llava_onevision": ({"vision_config": SIGLIP, "text_config": {**QWEN, "tie_word_embeddings": True}}, ["<image>"]),
    "vipllava": ({"vision_config": CLIP, "text_config": LLAMA, "vision_feature_layer": [-2, 1, 2]}, ["<image>"]),
    "idefics3": (
        {"vision_config": VISION, "text_config": LLAMA, "scale_factor": 2},
        ["<image>", "<fake_token_around_image>", "<global-img>"],
    ),
    "smolvlm": (
        {"vision_config": VISION, "text_config": LLAMA, "scale_factor": 2},
        ["<image>", "<fake_token_around_image>", "<global-img>"],
    ),
    "internvl": (
        {"vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}, "text_config": QWEN},
        ["<IMG_CONTEXT>", "<img>", "</img>"],
    ),
    "gemma3": (
        {
            "vision_config": SIGLIP,
            "text_config": {
                **{name: value for name, value in TEXT.items()},
                "model_type": "gemma3_text",
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 16,
                "query_pre_attn_scalar": 12,
            },
            "mm_tokens_per_image": 4,
        },
        ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    ),
    "lfm2_vl": (
        {
            "vision_config": {
                "model_type": "siglip2_vision_model",
                **{name: value for name, value in VISION.items() if name != "image_size"},
                "num_patches": 16,
            },
            "text_config": {
                **TEXT,
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"],
                "block_auto_adjust_ff_dim": False,
            },
            "projector_hidden_size": 20,
        },
        ["<image>", "<|image_start|>", "<|image_end|>"],
    ),
    "aya_vision": (
        {
            "vision_config": SIGLIP,
            "text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 16},
            "alignment_intermediate_size": 28,
        },
        ["<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL"],
    ),
}
# As SmolVLM's: it reads parts, and nothing else.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


@pytest.fixture
def source(tokenizer):
    """`source(family, **options)` -> a tiny random model of transformers' own, and its processor."""

    def make(family, **options):
        given, control = SOURCES[family]
        own = copy.deepcopy(tokenizer)
        own.add_tokens(["<|im_start|>", *control], special_tokens=True)
        config = copy.deepcopy({**given, **options})
        names = {"image_token_id": own.convert_tokens_to_ids(control[0])}
        config = AutoConfig.for_model(family, **config)
        config.image_token_id = names["image_token_id"]
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for name, parameter in model.named_parameters():  # what starts at 0 or 1 would hide a mistake
            if not name.endswith("embed_tokens.weight"):
                scale = parameter.data.reshape(len(parameter), -1).shape[1] ** -0.5 if parameter.ndim > 1 else 0.3
                parameter.data += torch.randn_like(parameter) * scale
        model.generation_config.eos_token_id = own.convert_tokens_to_ids("<|end|>")
        model.generation_config.pad_token_id = own.convert_tokens_to_ids("<|pad|>")
        placeholder = FAMILIES[family].said(own)[2]
        processor = SimpleNamespace(
            tokenizer=own,
            image_processor=SimpleNamespace(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], tile_size=32),
            chat_template=TEMPLATE.replace("PLACEHOLDER", placeholder),
        )
        return model, processor

    return make


def ours(source, processor, **options):
    made = {"view_strategy": "resize", "view_text": "", **options}
    own = PanoramaProcessor.from_vlm_pretrained(source, processor, **made)
    return PanoramaVLM.from_vlm_pretrained(source, processor, **made).eval(), own


def source_inputs(family, source, pixel_values):
    """What the source's own processor would make of flat images [N, 3, H, W] of the size of its tower."""
    count, _, height, width = pixel_values.shape
    if family in ("idefics3", "smolvlm"):
        return {"pixel_values": pixel_values[None]}
    if family == "llava_onevision":
        sizes = torch.tensor([[height, width]] * count)
        return {"pixel_values": pixel_values, "image_sizes": sizes, "batch_num_images": torch.tensor([count])}
    if family == "lfm2_vl":
        patch = source.config.vision_config.patch_size
        rows, columns = height // patch, width // patch
        patches = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)  # [N, 3, rows, columns, p, p]
        return {
            "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).reshape(count, rows * columns, -1),
            "spatial_shapes": torch.tensor([[rows, columns]] * count),
            "pixel_attention_mask": torch.ones(count, rows * columns, dtype=torch.long),
        }
    return {"pixel_values": pixel_values}


def source_features(family, source, pixel_values):
    """Of flat images, [N, tokens, D_lm], without what is put behind them."""
    with torch.no_grad():
        if family == "llava_next":  # which always cuts an image into tiles
            states = source.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            return source.model.multi_modal_projector(states[source.config.vision_feature_layer][:, 1:])
        inputs = source_inputs(family, source, pixel_values)
        features = source.get_image_features(**inputs).pooler_output
    features = [part for of_one in features for part in (of_one if of_one.ndim == 3 else [of_one])]
    if family in ("idefics3", "smolvlm"):
        features = features[0].chunk(len(pixel_values))
    features = torch.stack([*features])
    return features[:, :-1] if family == "llava_onevision" else features


@pytest.fixture
def question(panoramas):
    words = [{"type": "text", "text": text} for text in ("here ", "there ", "where?")]
    images = [{"type": "image", "image": each} for each in panoramas[:2]]
    return [{"role": "user", "content": [words[0], images[0], words[1], images[1], words[2]]}]


def asked(processor, messages, **options):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", **options
    )


@pytest.mark.parametrize("family", SOURCES)
def test_flat_images_are_shown_as_the_source_shows_them(family, source, question):
    """Two in one text: the same logits, and the same tokens."""
    theirs, processor = source(family)
    model, own = ours(copy.deepcopy(theirs), processor)
    inputs = asked(own, question)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"][:, 0]
    if family == "llava_next":
        rows = model.get_input_embeddings().weight
        features = source_features(family, theirs, pixels).flatten(0, 1)
        embeddings = rows[ids].masked_scatter((ids == own.image_token_id)[..., None], features)
        given = {"inputs_embeds": embeddings}
    else:
        given = {"input_ids": ids, **source_inputs(family, theirs, pixels)}
        newline = own.tokenizer.convert_tokens_to_ids(NEWLINE) or -1
        given["input_ids"] = ids.masked_fill(ids == newline, own.image_token_id)  # where its features end with it
        if family == "gemma3":
            given["token_type_ids"] = (ids == own.image_token_id).long()
    with torch.no_grad():
        expected = theirs(**given).logits
        logits = model(**inputs).logits[..., : expected.shape[-1]]
    silent = [own.image_token_id, *model.config.silent_token_ids]
    kept = [token for token in range(expected.shape[-1]) if token not in silent]
    torch.testing.assert_close(logits[..., kept], expected[..., kept], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": silent}
    tokens = model.generate(**inputs, **options)[:, ids.shape[1] :]
    begins = 0 if "inputs_embeds" in given else ids.shape[1]
    assert tokens.tolist() == theirs.generate(**given, **options)[:, begins:].tolist()
