"""Resamplers start by keeping what the tower says, and folders from before there was such a start load as they were."""

import json

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaVLM
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

KINDS = ("mlp", "avg_pool", "perceiver")
OPTIONS = {"resampler_queries": 4, "resampler_heads": 4}  # of the perceiver: the blocks of a pool of 2, on a 4 x 4 grid


def cosines(tokens):
    """[N, S, D] -> the cosine of each token with each of its view, [N, S, S], in float64."""
    tokens = tokens.double()
    lengths = tokens.square().sum(-1).sqrt()
    return torch.einsum("nid,njd->nij", tokens, tokens) / (lengths[:, :, None] * lengths[:, None])


def what_comes_in(tokens, kind):
    """The 4 x 4 tokens of a view [N, 16, D], each standardised, as each resampler puts them together."""
    blocks = tokens.view(-1, 2, 2, 2, 2, tokens.shape[-1])
    if kind == "avg_pool":
        tokens = blocks.mean((2, 4)).flatten(1, 2)
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / tokens.std(-1, keepdim=True)
    return tokens.view(blocks.shape).mean((2, 4)).flatten(1, 2) if kind == "perceiver" else tokens


def tower_like(width, generator):
    """Tokens [8, 16, width] of which neighbours are alike, at a scale and with a mean of their own."""
    coarse = torch.randn(8, width, 2, 2, generator=generator)
    fine = torch.randn(8, width, 4, 4, generator=generator)
    return (nn.functional.interpolate(coarse, scale_factor=2) + 0.5 * fine).flatten(2).mT * 7 + 2


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_resampler_keeps_the_angles_between_tokens(make, tower, kind, depth):
    model, _ = make(latent_dimension=128, resampler_type=kind, resampler_depth=depth, **OPTIONS)
    tokens = tower_like(tower["hidden_size"], torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = model.model.resampler(tokens)
    difference = cosines(kept) - cosines(what_comes_in(tokens, kind))
    assert difference.abs().max() < (0.03 if kind == "perceiver" else 1e-5)  # its queries start small, not at 0
    assert 0.9 < kept.std() < 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_resampler_keeps_which_token_is_which(make, kind):
    """Retrieval among noisy copies: after the resampler as good as before, with random layers worse."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8, "vision_use_head": False}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, 16, 256, generator=generator) + torch.zeros(64, 16, 256)
    noisy = tokens + 3.0 * torch.randn(64, 16, 256, generator=generator)

    def found(there, here):
        nearest = torch.einsum("nid,njd->nij", *(nn.functional.normalize(t, dim=-1) for t in (there, here))).argmax(-1)
        return (nearest == torch.arange(there.shape[1])).float().mean().item()

    before = found(what_comes_in(noisy, kind), what_comes_in(tokens, kind))
    after = {}
    for skip in (True, False):
        options = {"latent_dimension": 192, "resampler_type": kind, "resampler_skip": skip, **OPTIONS}
        resampler = make(vision=vision, **options)[0].model.resampler
        with torch.no_grad():
            after[skip] = found(resampler(noisy), resampler(tokens))
    assert after[True] > before - 0.06
    assert kind == "perceiver" or after[True] > after[False] + 0.02


def test_everything_of_the_resampler_learns_from_the_second_step(make):
    for kind in KINDS:
        model, _ = make(resampler_type=kind, **OPTIONS)
        resampler = model.model.resampler
        optimizer = torch.optim.SGD(resampler.parameters(), lr=0.1)
        tokens = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            optimizer.zero_grad()
            resampler(tokens)[..., 0].square().sum().backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in resampler.parameters())


@pytest.mark.parametrize("frequencies", [0, 6])
def test_the_ray_code_starts_at_the_scale_of_the_tokens(make, panoramas, frequencies):
    model, processor = make(latent_dimension=128, ray_frequencies=frequencies)
    seen = []
    model.model.projection.ray.register_forward_hook(lambda module, arguments, output: seen.append(output))
    pixels = processor(images=panoramas[0], return_tensors="pt")["pixel_values"]
    tokens = model.get_image_features(pixels).last_hidden_state
    assert 0.4 < seen[0].square().mean().sqrt() < 0.6
    assert 0.9 < tokens.std() < 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_holds_however_a_model_is_made(make, tower, kind, tmp_path):
    config = make(latent_dimension=64, resampler_type=kind, **OPTIONS)[0].config
    vision, language = AutoModel.from_config(config.vision_config), AutoModelForCausalLM.from_config(config.text_config)
    options = {"latent_dimension": 64, "resampler_type": kind, **OPTIONS}
    made = [
        AutoModel.from_config(config),
        AutoModel.from_config(config, dtype=torch.bfloat16).float(),
        PanoramaVLM.from_vision_text_pretrained(vision, language, image_token_id=300, **options),
    ]
    tokens = tower_like(tower["hidden_size"], torch.Generator().manual_seed(0))
    for model in made:
        with torch.no_grad():
            difference = cosines(model.model.resampler(tokens)) - cosines(what_comes_in(tokens, kind))
        assert difference.abs().max() < 0.03
        assert 0.45 < model.model.projection.ray.weight.std() * 19**0.5 < 0.55
    with torch.device("meta"):
        assert PanoramaVLM(config).device.type == "meta"
    nn.init.normal_(made[0].model.projection.ray.weight)
    for parameter in made[0].model.resampler.parameters():
        nn.init.normal_(parameter)
    made[0].save_pretrained(tmp_path)
    loaded = PanoramaVLM.from_pretrained(tmp_path)
    assert loaded.config.resampler_skip
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, made[0].get_parameter(name), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mlp", "avg_pool"])
def test_a_folder_from_before_there_was_a_skip_gives_what_it_gave(make, tmp_path, kind):
    """Its file does not name the option, its weights have the old names, and its resampler is layer after layer."""
    model, _ = make(resampler_type=kind, resampler_skip=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["resampler_skip"]
    file.write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    old = {name: torch.randn(shape) for name, shape in {"0.weight": 32, "0.bias": 32, "4.weight": 32}.items()}
    old |= {"4.bias": torch.randn(32), "1.weight": torch.randn(32, 32), "1.bias": torch.randn(32)}
    old |= {"3.weight": torch.randn(32, 32), "3.bias": torch.randn(32)}
    assert {name for name in weights if ".resampler." in name} == {f"model.resampler.layers.{name}" for name in old}
    save_file(
        weights | {f"model.resampler.layers.{name}": weight for name, weight in old.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    plain = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32))
    plain.load_state_dict(old)
    tokens = torch.randn(3, 16, 32)
    pooled = tokens if kind == "mlp" else tokens.view(3, 2, 2, 2, 2, 32).mean((2, 4)).flatten(1, 2)
    loaded = PanoramaVLM.from_pretrained(tmp_path)
    assert not loaded.config.resampler_skip
    torch.testing.assert_close(loaded.model.resampler(tokens), plain(pooled))
    loaded.save_pretrained(tmp_path / "again")
    assert not PanoramaConfig.from_pretrained(tmp_path / "again").resampler_skip
    assert PanoramaConfig().resampler_skip


def idefics3(tokens, pool):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    return Idefics3Connector.pixel_shuffle(None, tokens, pool)


def internvl(tokens, pool):
    from transformers.models.internvl.modeling_internvl import InternVLModel

    side = round(tokens.shape[1] ** 0.5)
    return InternVLModel.pixel_shuffle(None, tokens.unflatten(1, (side, side)), 1 / pool).flatten(1, 2)


@pytest.mark.parametrize("theirs", [idefics3, internvl])
def test_shuffled_tokens_are_those_of_other_models(make, tower, theirs):
    model, _ = make(latent_dimension=None, resampler_type="pixel_shuffle")
    tokens = torch.randn(3, 16, tower["hidden_size"])
    assert model.config.latent_dimension == 4 * tower["hidden_size"] and model.config.token_grid == (2, 2)
    assert torch.equal(model.model.resampler(tokens), theirs(tokens, 2))


@pytest.mark.parametrize(("kind", "side"), [("identity", 4), ("pixel_shuffle", 2)])
def test_a_ray_belongs_to_what_its_token_has_seen(make, tower, kind, side):
    """One patch of a view is marked; the token that moves most is the one whose ray goes through it."""
    model, _ = make(latent_dimension=None, resampler_type=kind)
    rays = model.view_plan.views[1].rays(model.token_grid) if hasattr(model, "view_plan") else None
    rays = model.model.view_plan.views[1].rays(model.model.token_grid) if rays is None else rays
    fine = model.model.view_plan.views[1].rays((4, 4))
    size = model.config.image_size // 4
    for layer in model.model.vision_tower.modules():  # a tower in which patches do not see each other
        if type(layer).__name__ == "SiglipAttention":
            nn.init.zeros_(layer.out_proj.weight)
    for row in range(4):
        for column in range(4):
            view = torch.zeros(1, 1, 3, 64, 64)
            marked = view.clone()
            marked[..., row * size : (row + 1) * size, column * size : (column + 1) * size] = 1.0
            with torch.no_grad():
                moved = (model.model.encode_views(marked) - model.model.encode_views(view))[0, 0].norm(dim=-1)
            assert (moved > 1e-6).sum() == 1
            found = torch.tensor(rays.reshape(-1, 3) @ fine[row, column]).argmax()  # the nearest ray
            assert moved.argmax() == found
    assert model.config.token_grid == (side, side)


@pytest.mark.parametrize("kind", ["identity", "pixel_shuffle"])
def test_resamplers_without_weights_train_and_come_back(make, ask, panoramas, tmp_path, kind):
    model, processor = make(latent_dimension=None, resampler_type=kind, vision_trainable_blocks=1, use_lora=False)
    assert not list(model.model.resampler.parameters())
    inputs = ask(processor, panoramas[0])
    for stage in ("vision", "resampler", "finetune"):
        assert model.set_stage(stage)
        labels = {} if stage == "vision" else {"labels": inputs["input_ids"]}
        model(**inputs, **labels, stage=stage).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    model.eval().save_pretrained(tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    answer = PanoramaVLM.from_pretrained(tmp_path).generate(**inputs, **options)
    assert torch.equal(answer, model.generate(**inputs, **options))


def test_what_a_resampler_without_weights_cannot_do_is_said(make):
    with pytest.raises(ValueError, match="latent_dimension must be 32 where resampler_type='identity'"):
        make(latent_dimension=64, resampler_type="identity")
    with pytest.raises(ValueError, match="resampler_pool must divide"):
        make(latent_dimension=None, resampler_type="pixel_shuffle", resampler_pool=3)
    model, _ = make(latent_dimension=None, resampler_type="identity")
    with pytest.raises(ValueError, match="nothing to train that later stages keep"):
        model.set_stage("vision")
