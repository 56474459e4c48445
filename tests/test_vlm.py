"""Models made from pretrained vision-language models: shown what the source would show, and everything behind."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.plan import panorama_config
from panorama_vlm.tests.launching import SAMPLES
from panorama_vlm.train.build import check_packing, check_parts, load_start
from panorama_vlm.train.config import load_config
from panorama_vlm.train.loop import train
from panorama_vlm.vlm_panorama import FAMILIES, NEWLINE
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.gemma4.image_processing_pil_gemma4 import convert_image_to_patches
from transformers.utils.chat_template_utils import render_jinja_template

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
    "gemma4": (
        {
            "vision_config": {
                **{name: value for name, value in VISION.items() if name != "image_size"},
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 32,
            },
            "text_config": {
                **TEXT,
                "vocab_size_per_layer_input": 620,
                "hidden_size_per_layer_input": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 16,
                "global_head_dim": 12,
                "pad_token_id": 0,
                "use_bidirectional_attention": None,
                "final_logit_softcapping": 2.0,
            },
            "audio_config": None,
        },
        ["<|image|>", "<|image>", "<image|>"],
    ),
    "gemma4, large": (
        {
            "vision_config": {
                **{name: value for name, value in VISION.items() if name != "image_size"},
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 32,
            },
            "text_config": {
                **TEXT,
                "vocab_size_per_layer_input": 620,
                "hidden_size_per_layer_input": 0,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 16,
                "global_head_dim": 12,
                "pad_token_id": 0,
                "use_bidirectional_attention": "vision",
                "final_logit_softcapping": 2.0,
            },
            "audio_config": None,
        },
        ["<|image|>", "<|image>", "<image|>"],
    ),
    "qwen3_vl": (
        {
            "vision_config": {
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 24,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 2],
            },
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
                "tie_word_embeddings": True,
            },
        },
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"],
    ),
    "qwen2_5_vl": (
        {
            "vision_config": {
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 24,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            },
        },
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"],
    ),
    "qwen3_5": (
        {
            "vision_config": {
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 24,
                "num_position_embeddings": 16,
            },
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_value_heads": 2,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            },
        },
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"],
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
    "lfm3_vl": (
        {
            "vision_config": {
                **{name: value for name, value in VISION.items() if name != "image_size"},
                "num_key_value_heads": 1,
                "patch_size": 4,
                "layer_types": ["conv", "full_attention", "full_attention"],
            },
            "text_config": {
                **TEXT,
                "model_type": "lfm3",
                "layer_types": ["conv", "full_attention"],
            },
            "projector_hidden_size": 20,
        },
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"],
    ),
    "aya_vision": (
        {
            "vision_config": SIGLIP,
            "text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 16},
            "alignment_intermediate_size": 28,
        },
        ["<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL"],
    ),
    "cohere2_vision": (
        {
            "vision_config": SIGLIP,
            "text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 16},
            "alignment_intermediate_size": 28,
        },
        ["<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"],
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
        config = AutoConfig.for_model(family.split(",")[0], **config)
        config.image_token_id = names["image_token_id"]
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for name, parameter in model.named_parameters():  # what starts at 0 or 1 would hide a mistake
            if not name.endswith("embed_tokens.weight"):
                scale = parameter.data.reshape(len(parameter), -1).shape[1] ** -0.5 if parameter.ndim > 1 else 0.3
                parameter.data += torch.randn_like(parameter) * scale
        model.generation_config.eos_token_id = own.convert_tokens_to_ids("<|end|>")
        model.generation_config.pad_token_id = own.convert_tokens_to_ids("<|pad|>")
        placeholder = FAMILIES[config.model_type].said(own)[2]
        processor = SimpleNamespace(
            tokenizer=own,
            image_processor=SimpleNamespace(
                image_mean=[0.4, 0.5, 0.6],
                image_std=[0.2, 0.3, 0.4],
                do_normalize=not family.startswith("gemma4"),
                tile_size=32,
                patch_size=4,
                merge_size=2,
                pooling_kernel_size=2,
                max_soft_tokens=17,
            ),
            chat_template=TEMPLATE.replace("PLACEHOLDER", placeholder),
        )
        return model, processor

    return make


def ours(source, processor, **options):
    made = {"view_strategy": "resize", "view_text": "", **options}
    if source.config.model_type.startswith(("qwen", "lfm3")):  # of any size
        made.setdefault("image_size", 32)
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
    if family.startswith(("qwen", "lfm3")):
        patches = torch.cat([_of_qwen_vl(image.numpy(), 4, 2) for image in pixel_values])
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height // 4, width // 4]] * count)}
    if family.startswith("gemma4"):
        patches, places = zip(*[_of_gemma4(image.numpy(), 4) for image in pixel_values], strict=True)
        return {"pixel_values": torch.stack(patches), "image_position_ids": torch.stack(places)}
    return {"pixel_values": pixel_values}


def _of_gemma4(image, patch):
    patches = torch.from_numpy(convert_image_to_patches(image, patch))
    side = image.shape[-1] // patch
    places = [[x, y] for y in range(side) for x in range(side)]
    return patches, torch.tensor(places)


def _of_qwen_vl(image, patch, merge):
    """As `Qwen2VLImageProcessorPil` does it."""
    rows, columns = (side // patch for side in image.shape[1:])
    shape = (3, rows // merge, merge, patch, columns // merge, merge, patch)
    patches = np.transpose(image.reshape(shape), (1, 4, 2, 5, 0, 3, 6))
    frames = np.repeat(patches[:, :, :, :, :, None], 2, axis=5)
    return torch.from_numpy(frames.reshape(rows * columns, -1))


def source_features(family, source, pixel_values):
    """Of flat images, [N, tokens, D_lm], without what is put behind them."""
    with torch.no_grad():
        if family == "llava_next":  # which always cuts an image into tiles
            states = source.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            return source.model.multi_modal_projector(states[source.config.vision_feature_layer][:, 1:])
        inputs = source_inputs(family, source, pixel_values)
        found = source.get_image_features(**inputs)
        features = found.pooler_output
        if "deepstack_features" in found:  # what later layers are shown
            layers = zip(features, *found.deepstack_features, strict=True)
            features = [torch.cat(of_one, -1) for of_one in layers]
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
        if family.startswith(("gemma", "qwen")):
            name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
            given[name] = (ids == own.image_token_id).long()
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


@pytest.mark.parametrize("family", SOURCES)
def test_each_of_nine_views_is_shown_as_the_source_shows_an_image(family, source, panoramas):
    theirs, processor = source(family)
    model, own = ours(copy.deepcopy(theirs), processor, view_strategy="anyres_e2p")
    pixels = own.image_processor(panoramas[:2], return_tensors="pt")["pixel_values"]  # [2, 9, 3, H, W]
    assert pixels.shape[1] == 9
    shown = model.get_image_features(pixels).pooler_output.unflatten(1, (9, -1))
    for views, tokens in zip(pixels, shown, strict=True):
        torch.testing.assert_close(tokens, source_features(family, theirs, views), rtol=1e-4, atol=1e-5)
    assert own.num_image_tokens == shown.shape[1] * shown.shape[2]


@pytest.mark.parametrize("family", SOURCES)
def test_a_ray_belongs_to_what_its_token_has_seen(family, source):
    """In a tower without attention a patch of the input moves one token: the one that looks that way."""
    model, own = ours(*source(family), view_strategy="e2p")
    for name, parameter in model.model.vision_tower.named_parameters():
        if any(part in name for part in ("out_proj", "o_proj", "projection_layer", "attn.proj")):
            parameter.data.zero_()
    views = model.config.num_views
    plain = torch.rand(1, views, 3, 32, 32)
    with torch.no_grad():
        before = model.get_image_features(plain).pooler_output[0].unflatten(0, (views, -1))
        for view, row, column in ((0, 0, 0), (1, 1, 3), (3, 2, 0), (7, 3, 2)):
            marked = plain.clone()
            marked[0, view, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
            after = model.get_image_features(marked).pooler_output[0].unflatten(0, (views, -1))
            moved = (after - before).norm(dim=-1).gt(1e-5).nonzero().tolist()
            looking = model.config.view_plan.views[view]
            ray = looking.rays((4, 4))[row, column]
            tokens = looking.rays(model.config.token_grid).reshape(-1, 3)
            assert moved == [[view, int((tokens @ ray).argmax())]]


@pytest.mark.parametrize("family", SOURCES)
def test_all_weights_of_the_source_are_there_or_named(family, source, caplog):
    theirs, processor = source(family)
    with caplog.at_level("INFO"):
        model, _ = ours(copy.deepcopy(theirs), processor)
    kept = [parameter.detach() for parameter in model.parameters()]

    def is_kept(weight):
        shapes = (weight, weight.T if weight.ndim == 2 else weight)
        return any(k.shape == w.shape and torch.equal(k, w) for k in kept for w in shapes)

    lost = {name for name, weight in theirs.named_parameters() if not is_kept(weight.detach())}
    if family in ("llava", "llava_next", "vipllava"):  # the last block, behind the features
        assert "encoder.layers[2:] of the tower" in caplog.text
        cut = {name for name in lost if "vision_tower" in name}
        assert cut and all(".encoder.layers.2." in name for name in cut)
        lost -= cut
    if model.config.silent_token_ids:  # a row of the table, which was not used
        (token,) = model.config.silent_token_ids
        rows = model.get_input_embeddings().weight.detach()
        assert torch.equal(rows[token], theirs.model.image_newline)
        before = theirs.get_input_embeddings().weight
        assert torch.equal(rows[:token], before[:token]) and torch.equal(rows[token + 1 :], before[token + 1 :])
        lost -= {name for name in lost if name.endswith(("image_newline", "embed_tokens.weight"))}
    assert not lost
    torch.testing.assert_close(model.model.projection.ray.weight.abs().max(), torch.tensor(0.0))


@pytest.mark.parametrize("family", SOURCES)
def test_stages_lora_saving_and_loading(family, source, panoramas, tmp_path):
    model, own = ours(*source(family), view_strategy="anyres_e2p", view_text="{direction}: ", lora_rank=2)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "where?"}]},
        {"role": "assistant", "content": "A bridge."},
    ]
    inputs = own.apply_chat_template([messages], return_labels=True)
    with pytest.raises(ValueError, match="nothing to train that later stages keep"):
        model.set_stage("vision")
    model.config.vision_trainable_blocks = 1
    for stage in ("vision", "resampler", "finetune"):
        trained = model.set_stage(stage)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        loss = model(**inputs, stage=stage).loss
        loss.backward()
        without = [name for name in trained if model.get_parameter(name).grad is None]
        assert loss.isfinite() and not without
        assert ("projection.ray.weight" in str(trained)) == (stage != "vision")
        optimizer.step()
        optimizer.zero_grad()
    model.merge_lora()
    model.eval()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    again = PanoramaVLM.from_pretrained(tmp_path).eval()
    processor = PanoramaProcessor.from_pretrained(tmp_path)
    answers = []
    for each, reads in ((model, own), (again, processor)):
        asking = asked(reads, messages[:1])
        answers.append(each.generate(**asking, max_new_tokens=5, do_sample=False).tolist())
    assert answers[0] == answers[1]
    assert again.generation_config.eos_token_id == own.tokenizer.convert_tokens_to_ids("<|end|>")


WITHOUT = """
import json, sys
import torch
from transformers import AutoModel
assert "panorama_vlm" not in sys.modules
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    print(json.dumps(model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()))
"""


@pytest.mark.slow
def test_a_process_without_the_package_says_the_same(source, question, tmp_path):
    folders, expected = [], []
    for family in ("gemma3", "qwen3_vl"):
        model, own = ours(*source(family), view_strategy="cubemap", view_text="{direction}: ")
        inputs = dict(asked(own, question))
        expected.append(model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist())
        folders.append(str(tmp_path / family))
        model.save_pretrained(folders[-1])
        own.save_pretrained(folders[-1])
        torch.save(inputs, folders[-1] + "/inputs.pt")
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-P", "-c", WITHOUT, *folders]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[[")] == expected


# Chat templates as they were released

SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


QWEN_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("family", "template", "closing"),
    [
        ("qwen2_5_vl", QWEN_VL, "<|im_end|>"),
        ("qwen3_vl", QWEN_VL, "<|im_end|>"),
        ("smolvlm", SMOLVLM, "<end_of_utterance>"),
        ("llava_onevision", ONEVISION, "<|im_end|>"),
        ("gemma3", GEMMA3, "<end_of_turn>"),
        ("internvl", INTERNVL, "<|im_end|>"),
    ],
)
def test_chats_are_written_as_the_source_writes_them(family, template, closing, source, panoramas):
    theirs, processor = source(family)
    processor.tokenizer.add_tokens([closing], special_tokens=True)
    processor.chat_template = template
    _, own = ours(theirs, processor)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "where?"}]},
        {"role": "assistant", "content": "A bridge."},
        {"role": "user", "content": "sure?"},
    ]
    as_parts = [
        {**each, "content": [{"type": "text", "text": each["content"]}] if isinstance(each["content"], str) else
         [{"type": part["type"], "text": part.get("text")} for part in each["content"]]}
        for each in messages
    ]  # fmt: skip
    (expected,), _ = render_jinja_template([as_parts], chat_template=template, add_generation_prompt=True, bos_token="")
    before, behind, placeholder = FAMILIES[family].said(processor.tokenizer)
    newline = NEWLINE if theirs.config.model_type == "llava_onevision" else ""
    shown = before + own.image_token * own.num_image_tokens + behind + newline
    inputs = asked(own, messages)
    assert own.tokenizer.decode(inputs["input_ids"][0]) == own.tokenizer.decode(
        own.tokenizer.encode(expected.replace(placeholder, shown), add_special_tokens=False)
    )
    taught = own.apply_chat_template([messages[:3]], return_labels=True)
    words = own.tokenizer.decode(taught["labels"][0][taught["labels"][0] != -100])
    assert words.strip().removesuffix(closing).strip() == "A bridge." and closing in words


# The tokens of a view see each other


@pytest.mark.parametrize(("family", "options"), [("gemma3", {"mm_tokens_per_image": 16}), ("gemma4, large", {})])
def test_image_tokens_see_each_other_whatever_the_cache_and_in_training(family, options, source, question):
    theirs, processor = source(family, **options)
    model, own = ours(copy.deepcopy(theirs), processor)
    inputs = asked(own, question)
    types = (inputs["input_ids"] == own.image_token_id).long()
    name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
    given = {**inputs, **source_inputs(family, theirs, inputs["pixel_values"][:, 0]), name: types}
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [own.image_token_id]}
    expected = theirs.generate(**given, **options).tolist()
    for cache in (None, "static", "dynamic"):
        assert model.generate(**inputs, **options, cache_implementation=cache).tolist() == expected
    assert model.generate(**inputs, **options, use_cache=False).tolist() == expected
    labels = inputs["input_ids"].masked_fill(types == 1, -100)
    for each, batch in ((theirs, given), (model, inputs)):
        each.train()
        each(**batch, labels=labels).loss.backward()
    query = "language_model.layers.{}.self_attn.q_proj.weight"
    for layer in (0, 1):
        gradients = [each.model.get_parameter(query.format(layer)).grad for each in (theirs, model)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-2 * float(gradients[0].abs().max()))
    model.eval()
    causal = copy.deepcopy(model)
    causal.model.sees_both_ways = False
    with torch.no_grad():
        assert (causal(**inputs).logits - model(**inputs).logits).abs().max() > 1e-3


def test_a_later_panorama_is_seen_both_ways_with_a_cache(source, panoramas):
    """A chat that goes on with what the cache holds says what it says from the beginning."""
    model, own = ours(*source("gemma3"), view_strategy="cubemap")
    turn = [{"role": "user", "content": [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "A?"}]}]
    more = [
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "image", "image": panoramas[1]}, {"type": "text", "text": "B?"}]},
    ]
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**asked(own, turn), **options)
    whole = asked(own, turn + more)
    with torch.no_grad():
        logits = model(**whole).logits[:, -1]
    cache = first.past_key_values
    later = model.generate(**whole, **options, past_key_values=cache, output_logits=True)
    torch.testing.assert_close(later.logits[0], logits, rtol=1e-4, atol=1e-4)


def test_packed_questions_see_the_views_as_alone(source, panoramas):
    model, own = ours(*source("gemma3"), view_strategy="cubemap", view_text="{direction}: ")
    image = {"type": "image", "image": panoramas[0]}
    chats = [
        [
            {"role": "user", "content": [image, {"type": "text", "text": words}]},
            {"role": "assistant", "content": answer},
        ]
        for words, answer in (("where?", "A bridge."), ("what is behind me?", "Water."))
    ]
    model.model.language_model.config.sliding_window = 10**6  # a mask [B, 1, T, T] is that of every layer
    packed = own.pack_conversations(chats)
    with torch.no_grad():
        logits = model(**{name: packed[name] for name in packed if name != "labels"}, stage="finetune").logits[0]
        for chat in chats:
            alone = own.apply_chat_template([chat], return_labels=True)
            expected = model(**alone).logits[0][alone["labels"][0] != -100]
            words = alone["labels"][0][alone["labels"][0] != -100]
            ids = packed["labels"][0].unfold(0, len(words), 1).eq(words).all(1).nonzero()[0, 0]
            torch.testing.assert_close(logits[ids : ids + len(words)], expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_let_image_tokens_see_each_other_says_so(source, question):
    model, own = ours(*source("gemma3"))
    inputs = asked(own, question)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeddings = model.model.embed(inputs["input_ids"], features)
    with pytest.raises(ValueError, match="token_type_ids"):
        model(inputs_embeds=embeddings)
    types = (inputs["input_ids"] == own.image_token_id).long()
    with torch.no_grad():
        given = model(inputs_embeds=embeddings, token_type_ids=types).logits
        torch.testing.assert_close(given, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        model(**inputs)
    with pytest.raises(ValueError, match="words between the views"):
        ours(*source("gemma3"), view_strategy="cubemap", view_prefix="", view_suffix="")


# Positions of three axes


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_positions_of_views_are_those_of_the_source(family, source, panoramas):
    """Of a padded batch of conversations with different numbers of panoramas."""
    theirs, processor = source(family)
    model, own = ours(copy.deepcopy(theirs), processor, view_strategy="cubemap", view_text="{direction}: ")
    image = [{"type": "image", "image": each} for each in panoramas[:3]]
    words = {"type": "text", "text": "where?"}
    chats = [[{"role": "user", "content": content}] for content in ([image[0], words], [*image[1:], words], [words])]
    inputs = asked(own, chats, padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    types = (ids == own.image_token_id).long()
    grids = torch.tensor([[1, 8, 8]] * (3 * 6))
    expected, _ = theirs.model.get_rope_index(ids, types, image_grid_thw=grids, attention_mask=mask)
    positions = model.model.grid_positions(ids, mask)
    assert torch.equal(positions[1:], expected)
    assert torch.equal(positions[0], ((mask.cumsum(1) - 1) * mask))


def test_generation_goes_on_behind_the_rows_of_the_views(source, panoramas):
    """Padded rows, fixed caches and chats that go on say what each says alone from the beginning."""
    theirs, processor = source("qwen3_vl")
    model, own = ours(theirs, processor, view_strategy="cubemap")
    image = [{"type": "image", "image": each} for each in panoramas[:2]]
    words = {"type": "text", "text": "what is behind me?"}
    chats = [[{"role": "user", "content": content}] for content in ([*image, words], [image[0], words])]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(**asked(own, chat), **options)[0, -4:].tolist() for chat in chats]
    batch = asked(own, chats, padding=True)
    for cache in (None, "static"):
        tokens = model.generate(**batch, **options, cache_implementation=cache)[:, -4:]
        assert tokens.tolist() == alone
    more = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": [image[1], words]}]
    options |= {"max_new_tokens": 1, "return_dict_in_generate": True}
    first = model.generate(**asked(own, chats[1]), **options)
    whole = asked(own, chats[1] + more)
    with torch.no_grad():
        logits = model(**whole).logits[:, -1]
    later = model.generate(**whole, **options, past_key_values=first.past_key_values, output_logits=True)
    torch.testing.assert_close(later.logits[0], logits, rtol=1e-4, atol=1e-4)


def test_what_hides_the_positions_is_refused(source, panoramas):
    model, own = ours(*source("qwen3_vl"), view_strategy="cubemap")
    chat = [
        {"role": "user", "content": [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "where?"}]},
        {"role": "assistant", "content": "here"},
    ]
    with pytest.raises(ValueError, match="packed rows, inputs_embeds and steps with a cache"):
        model(**own.pack_conversations([chat, chat]))
    with pytest.raises(ValueError, match="independent_questions"):
        check_packing(model)
    with pytest.raises(ValueError, match="need visual_pos_masks"):
        model(inputs_embeds=torch.zeros(1, 3, 24))
    with pytest.raises(ValueError, match="packed rows, inputs_embeds and steps with a cache"):
        model(inputs_embeds=torch.zeros(1, 3, 24), visual_pos_masks=None, deepstack_visual_embeds=None)
    inputs = asked(own, chat[:1])
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match="steps with a cache"):
        model(torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(ValueError, match="needs whole views"):
        ours(*source("qwen3_vl"), view_strategy="e2p", token_selection="owned")
    with pytest.raises(ValueError, match="needs positions of three axes"):
        ours(*source("llava"), image_positions="grid")


def test_views_may_have_another_size_where_the_tower_takes_it(source, panoramas):
    theirs, processor = source("smolvlm")
    model, own = ours(theirs, processor, view_strategy="cubemap", image_size=64)
    assert model.config.token_grid == (4, 4)
    pixels = own.image_processor(panoramas[0], return_tensors="pt")["pixel_values"]
    shown = model.get_image_features(pixels).pooler_output.unflatten(1, (6, -1))[0]
    torch.testing.assert_close(shown, source_features("smolvlm", theirs, pixels[0]), rtol=1e-4, atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("glm4v", "M-RoPE.*Take one of type .*gemma3"),
        ("qwen2_vl", "take a Qwen2.5-VL"),
        ("mistral3", "at their own size"),
        ("paligemma", "reads its whole prompt in both directions"),
        ("blip-2", "is not known here"),
    ],
)
def test_families_that_cannot_be_shown_views_are_refused_with_the_reason(family, words, source):
    _, processor = source("llava")

    class OfTheFamily(PreTrainedModel):
        def __init__(self, config):
            torch.nn.Module.__init__(self)
            self.config = config

    vlm = OfTheFamily(AutoConfig.for_model(family))
    with pytest.raises(ValueError, match=words):
        PanoramaProcessor.from_vlm_pretrained(vlm, processor)


def test_what_is_the_sources_own_cannot_be_chosen(source):
    theirs, processor = source("smolvlm")
    with pytest.raises(ValueError, match="resampler_type cannot be chosen"):
        ours(theirs, processor, resampler_type="mlp")
    with pytest.raises(ValueError, match="processor must be given"):
        PanoramaVLM.from_vlm_pretrained(theirs)
    theirs.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"weights that have no place here: model\.extra\.weight"):
        ours(theirs, processor)
    theirs, processor = source("llava", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="shows CLS, which looks nowhere"):
        ours(theirs, processor)


# From a folder, and in training


@pytest.fixture
def folder(source, tmp_path):
    """`folder(family)` -> the folder of a source, as it would lie on the Hub."""

    def make(family, image_processor):
        theirs, processor = source(family)
        path = tmp_path / f"a-{family}"
        theirs.save_pretrained(path)
        processor.tokenizer.save_pretrained(path)
        (path / "chat_template.jinja").write_text(processor.chat_template)
        statistics = {name: getattr(processor.image_processor, name) for name in ("image_mean", "image_std")}
        written = {"image_processor_type": image_processor, **statistics}
        (path / "preprocessor_config.json").write_text(json.dumps(written))
        return path, theirs, processor

    return make


@pytest.mark.parametrize(("family", "reader"), [("smolvlm", "SmolVLMImageProcessor"), ("llava", "CLIPImageProcessor")])
def test_a_folder_is_a_source_as_the_model_itself_is(family, reader, folder, question):
    path, theirs, processor = folder(family, reader)
    options = {"view_strategy": "cubemap"}
    own = PanoramaProcessor.from_vlm_pretrained(path, **options)
    model = PanoramaVLM.from_vlm_pretrained(path, vlm_kwargs={"dtype": torch.float32}, **options).eval()
    assert (model.config.vlm_name, model.config.view_text) == (f"a-{family}", "{direction}: ")
    for start in ("--compose.vlm", "--model"):  # the plan is of this, too
        run = ["--data", str(SAMPLES), start, str(path), "--options.view_strategy", "cubemap"]
        planned = panorama_config(load_config(run))
        with torch.device("meta"):
            named = PanoramaVLM(planned).named_parameters()
        assert {name: p.shape for name, p in named} == {name: p.shape for name, p in model.named_parameters()}
    loaded, reads = ours(theirs, processor, **options, view_text="{direction}: ")
    inputs, expected = asked(own, question), asked(reads, question)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, loaded(**expected).logits)


def test_training_starts_from_one(folder, tmp_path):
    path, *_ = folder("smolvlm", "SmolVLMImageProcessor")
    steps = ["--finetune.max_steps", "1", "--finetune.batch_size", "2", "--eval_samples", "0", "--eval_batches", "1"]
    options = ["--options.view_strategy", "resize", "--options.lora_rank", "2"]
    shared = ["--data", str(SAMPLES), "--num_workers", "0", "--trackers", "[]", *steps, *options]
    start = ["--compose.vlm", str(path), "--stage", "finetune", "--output", str(tmp_path / "run"), *shared]
    train(load_config(start))
    saved = tmp_path / "run" / "finetune"
    model, processor = load_start(load_config(["--model", str(saved), *shared]))
    assert (model.config.vlm_name, processor.view_text) == ("a-smolvlm", "{direction}: ")
    assert processor.view_prefix == "<fake_token_around_image><global-img>"
    assert ", both of a-smolvlm, joined" in (saved / "README.md").read_text()
    named = load_config(["--model", str(path), *shared])  # as compose.vlm does
    check_parts(named)
    torch.testing.assert_close(
        load_start(named)[0].model.projection.layers[0].weight,
        load_start(load_config(start))[0].model.projection.layers[0].weight,
    )
    with pytest.raises(ValueError, match="leave out compose.vision"):
        load_config([*start, "--compose.vision", "x", "--compose.language", "y"])
    with pytest.raises(ValueError, match="compose.vlm: 'nowhere' is no folder here"):
        check_parts(load_config(["--compose.vlm", "nowhere", *shared]))


@pytest.mark.parametrize("vlm", [None, 5, [], {}, b"x", "", math.nan])
def test_what_is_no_vision_language_model_is_refused(vlm):
    for make in (PanoramaProcessor.from_vlm_pretrained, PanoramaVLM.from_vlm_pretrained):
        with pytest.raises(ValueError, match="vlm must be a Hub id, a folder, or a model of transformers, got"):
            make(vlm)


@pytest.mark.parametrize(
    ("name", "value"), [("model_type", [1]), ("mm_tokens_per_image", 0), ("vision_config", None), ("text_config", {})]
)
def test_a_configuration_that_its_family_does_not_have_is_refused(name, value, source):
    theirs, processor = source("gemma3")
    setattr(theirs.config, name, value)
    with pytest.raises(ValueError, match="is not one of its family|is not known here|needs its 'model_type'"):
        PanoramaProcessor.from_vlm_pretrained(theirs, processor)
