"""The tables of `docs/backbones.md`: every tower and every language model through a whole life."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaProcessor, PanoramaVLM
from panorama_vlm.language_loss_panorama import LANGUAGE_HEADS
from panorama_vlm.towers_panorama import is_backbone, new_tower, tower_of, try_out
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForCausalLM

DOCS = Path(__file__).resolve().parent.parent / "docs" / "backbones.md"
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
RESNET = {**STAGES, "embedding_size": 8, "layer_type": "basic"}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 64}
EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
# model_type, options, side of the grid for images of 64 pixels, D_vision
TOWERS = {
    "siglip": ("siglip_vision_model", {**VIT, "vision_use_head": False}, 4, 32),
    "siglip2": ("siglip_vision_model", VIT, 4, 32),
    "siglip2 naflex": ("siglip2_vision_model", {**VIT, "num_patches": 16}, 4, 32),
    "clip": ("clip_vision_model", VIT, 4, 32),
    "dinov2": ("dinov2", VIT, 4, 32),
    "dinov2 with registers": ("dinov2_with_registers", VIT, 4, 32),
    "dinov3": ("dinov3_vit", {**VIT, "num_register_tokens": 4}, 4, 32),
    "vit": ("vit", VIT, 4, 32),
    "deit": ("deit", VIT, 4, 32),
    "beit": ("beit", VIT, 4, 32),
    "resnet": ("resnet", RESNET, 2, 32),
    "convnext": ("convnext", STAGES, 2, 32),
    "convnextv2": ("convnextv2", STAGES, 2, 32),
    "dinov3 convnext": ("dinov3_convnext", STAGES, 2, 32),
    "swin": ("swin", SWIN, 2, 64),
    "swinv2": ("swinv2", SWIN, 2, 64),
    "regnet": ("regnet", {**STAGES, "embedding_size": 8, "groups_width": 8}, 2, 32),
    "efficientnet": ("efficientnet", EFFICIENTNET, 2, 320),
    "resnet, stage 3": ("resnet", {**RESNET, "out_features": ["stage3"]}, 4, 24),
    "convnext, stage 3": ("convnext", {**STAGES, "out_features": ["stage3"]}, 4, 24),
    "dinov2, layer 1": ("dinov2", {**VIT, "out_features": ["stage1"]}, 4, 32),
}
LANGUAGE = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Of SmolLM2 the family is Llama.
LANGUAGES = (
    *("qwen2", "qwen3", "llama", "gemma2", "gemma3_text", "mistral", "phi3", "smollm3", "granite"),
    *("olmo2", "qwen3_moe"),
)
OWN = {"qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}}


def tower_config(name, **options):
    family, given, _, _ = TOWERS[name]
    return AutoConfig.for_model(family, **{**given, **options})


def language_config(family):
    return AutoConfig.for_model(family, **{**LANGUAGE, **OWN.get(family, {})})


def through_its_life(vision, language, tokenizer, panorama, ask, folder, **options):
    """Composed of folders, trained a step in each stage, asked, saved, loaded and asked again."""
    torch.manual_seed(0)
    new_tower(vision).save_pretrained(folder / "vision")
    AutoModelForCausalLM.from_config(language).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    options = {"latent_dimension": 32, "image_size": 64, "lora_rank": 2, **options}
    names = [str(folder / part) for part in ("vision", "language")]
    model = PanoramaVLM.from_vision_text_pretrained(*names, **options)
    processor = PanoramaProcessor.from_vision_text_pretrained(*names, **options)
    for part in ("vision_tower", "language_model"):
        source = new_tower(vision) if part == "vision_tower" else AutoModel.from_config(language)
        source = type(source).from_pretrained(folder / part.split("_")[0])
        for name, parameter in source.named_parameters():
            kept = model.model.get_parameter(f"{part}.{name}")[: len(parameter)] if parameter.ndim else parameter
            torch.testing.assert_close(kept, parameter, rtol=0, atol=0)
    inputs = ask(processor, panorama)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    for stage in ("vision", "resampler", "finetune"):
        trained = model.set_stage(stage)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        loss = model(**inputs, labels=labels, stage=stage).loss
        loss.backward()
        without = [name for name in trained if model.get_parameter(name).grad is None]
        assert not without and loss.isfinite()
        optimizer.step()
        optimizer.zero_grad()
    model.merge_lora()
    model.eval()
    model.save_pretrained(folder / "saved")
    again = PanoramaVLM.from_pretrained(folder / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    answers = [m.generate(**inputs, max_new_tokens=3, do_sample=False).tolist() for m in (model, again)]
    assert answers[0] == answers[1]
    return model


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_goes_through_its_life(name, tokenizer, panoramas, ask, tmp_path):
    vision = tower_config(name)
    model = through_its_life(vision, language_config("qwen3"), tokenizer, panoramas[0], ask, tmp_path)
    _, _, side, width = TOWERS[name]
    assert model.config.vision_grid == (side, side)
    with torch.no_grad():
        assert model.model.tower_tokens(torch.zeros(1, 9, 3, 64, 64)).shape == (1, 9, side * side, width)


@pytest.mark.parametrize("name", sorted({*TOWERS} - {"efficientnet"}))  # of random weights a cell of it sees all alike
def test_tokens_lie_row_by_row_over_the_view_at_another_size_too(make, name):
    side = TOWERS[name][2]
    for size in (64, 128) if side == 4 else (128, 256):
        model, _ = make(vision=tower_config(name).to_dict(), image_size=size)
        rows = side * size // 64
        assert model.config.vision_grid == (rows, rows)
        for parameter in model.model.vision_tower.parameters():  # what starts near zero would hide a mistake
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        model.double()
        images = torch.rand(1, 1, 3, size, size, dtype=torch.float64, requires_grad=True)
        places = (torch.arange(size).double() + 0.5) * rows / size - 0.5
        seen = []  # the centre of what a token depends on, in cells
        for token in range(rows * rows):
            images.grad = None
            model.model.tower_tokens(images)[0, 0, token].square().sum().backward()
            weights = images.grad[0, 0].square().sum(0)
            down, right = (weights.sum(axis) @ places / weights.sum() for axis in (1, 0))
            seen.append(torch.stack([down, right]))
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(rows)).T.double()
        related = torch.corrcoef(torch.cat([torch.stack(seen).T, cells]))[:2, 2:]
        assert related.diag().min() > 0.7 and (related - related.diag().diag()).abs().max() < 0.4


@pytest.mark.parametrize("name", TOWERS)
def test_all_that_trains_of_a_whole_tower_gets_a_gradient_and_nothing_else_has_one(make, panoramas, name):
    model, processor = make(vision=tower_config(name).to_dict(), image_size=64, vision_trainable_blocks="all")
    trained = model.set_stage("vision")
    pixels = processor.image_processor(panoramas[:2], return_tensors="pt")["pixel_values"]
    model.requires_grad_(True)
    model(pixels, stage="vision").loss.backward()
    tower = {n: p for n, p in model.named_parameters() if "vision_tower" in n}
    assert {n for n in trained if "vision_tower" in n} == {n for n, p in tower.items() if p.grad is not None}


@pytest.mark.parametrize("family", LANGUAGES)
def test_a_language_model_goes_through_its_life(family, tokenizer, panoramas, ask, tmp_path):
    assert family in LANGUAGE_HEADS
    options = {"lora_dropout": 0.0} if family.endswith("_moe") else {}  # peft knows none for experts
    through_its_life(tower_config("siglip"), language_config(family), tokenizer, panoramas[0], ask, tmp_path, **options)


@pytest.mark.parametrize("kind", ["mlp", "avg_pool", "perceiver", "qformer", "c_abstractor", "bimamba", "mlp_v1"])
def test_a_resampler_goes_through_its_life(kind, tokenizer, panoramas, ask, tmp_path):
    options = {"resampler_type": kind, "resampler_queries": 4, "resampler_heads": 4}
    through_its_life(
        tower_config("siglip"), language_config("qwen3"), tokenizer, panoramas[0], ask, tmp_path, **options
    )


def test_a_tower_of_the_backbone_api_gives_the_feature_map_of_the_stage_that_is_named():
    torch.manual_seed(0)
    config = tower_config("resnet, stage 3")
    assert is_backbone(config) and not is_backbone(tower_config("resnet"))
    backbone = AutoBackbone.from_config(config).eval()
    whole = AutoModel.from_config(tower_config("resnet")).eval()
    whole.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = tower_of(config)(backbone, images)
        layers = whole(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tokens, layers[3].flatten(2).mT)


def test_the_stage_can_be_named_where_a_model_is_composed(tokenizer, tmp_path):
    whole = AutoModel.from_config(tower_config("convnext"))
    whole.save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(language_config("qwen3")).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    names = [str(tmp_path / part) for part in ("vision", "language")]
    options = {"vision_kwargs": {"out_features": ["stage3"]}, "image_size": 64, "latent_dimension": 32}
    model = PanoramaVLM.from_vision_text_pretrained(*names, **options)
    assert model.config.vision_grid == (4, 4)
    assert PanoramaProcessor.from_vision_text_pretrained(*names, **options).num_image_tokens == (
        model.config.num_image_tokens
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        layers = whole.eval()(images, output_hidden_states=True).hidden_states
        tokens = model.model.tower_tokens(images[:, None])[:, 0]
    torch.testing.assert_close(tokens, torch.nn.functional.layer_norm(layers[3].flatten(2).mT, (24,), eps=1e-6))


@pytest.mark.parametrize("name", ["efficientnet", "regnet"])
def test_tokens_are_the_cells_of_the_map_in_reading_order(name):
    config = tower_config(name)
    tower = new_tower(config).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        tokens, cells = tower_of(config)(tower, images), tower(images).last_hidden_state
    for row, column in ((0, 1), (1, 0), (2, 1)):
        torch.testing.assert_close(tokens[:, 3 * row + column], cells[:, :, row, column])


def test_a_backbone_given_as_a_model_is_kept_or_refused(make):
    language = AutoModelForCausalLM.from_config(language_config("qwen3"))
    options = {"image_size": 64, "latent_dimension": 32, "image_token_id": 599}
    stage = AutoBackbone.from_config(tower_config("resnet, stage 3"))
    assert PanoramaVLM.from_vision_text_pretrained(stage, language, **options).model.vision_tower is stage
    with pytest.raises(ValueError, match="ResNetBackbone would not be loaded again as it is.*AutoModel.from_config"):
        last = AutoBackbone.from_config(tower_config("resnet"))
        PanoramaVLM.from_vision_text_pretrained(last, language, **options)


@pytest.mark.parametrize(
    ("vision", "size", "words"),
    [
        ({"model_type": "vit_mae", **VIT}, None, r"gives \[2, 5, 32\] for 2 images"),
        ({"model_type": "levit"}, None, "gives .* and not"),
        ({"model_type": "pixtral", **VIT}, None, r"gives \[1, "),
        ({"model_type": "yolos", **VIT, "image_size": [64, 64]}, None, "behind its patches"),
        ({"model_type": "qwen3_vl_vision"}, 48, "image_size must be a multiple of 32, a block of patches"),
        ({"model_type": "sam2_vision_model"}, 64, "image_size or no patch_size|no grid"),
        ({"model_type": "timm_backbone", "backbone": "resnet18"}, 64, "needs a package that is not installed"),
        ({"model_type": "efficientnet"}, 240, "not square or do not divide an image of image_size=240"),
        ({"model_type": "swin", **SWIN}, 72, "not square or do not divide an image of image_size=72"),
        ({"model_type": "rt_detr_resnet"}, None, "image_size must say which"),
        ({"model_type": "bert"}, 64, "image_size or no patch_size"),
    ],
)
def test_a_tower_that_cannot_work_is_refused_on_construction_with_the_reason(vision, size, words):
    with pytest.raises(ValueError, match=words):
        PanoramaConfig(vision, {"model_type": "qwen3", **LANGUAGE}, **({} if size is None else {"image_size": size}))


def test_a_trial_costs_no_memory_no_random_numbers_and_is_made_once():
    assert try_out(AutoConfig.for_model("convnext", out_features=["stage3"]), 256).shape == (2, 384, 16, 16)
    config = AutoConfig.for_model("beit")
    before = torch.get_rng_state()
    trial = try_out(config, 224)
    assert trial.shape == (2, 768, 14, 14) and try_out(config, 224) is trial
    assert torch.equal(before, torch.get_rng_state())


def test_every_row_of_the_tables_is_a_test():
    rows = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    rows = {row.strip("`") for row in rows}
    assert {*TOWERS, *LANGUAGES} <= rows
