"""Resamplers start by keeping what the tower says, and folders from before there was such a start load as they were."""

import json

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaVLM
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

KINDS = ("mlp", "avg_pool", "perceiver", "qformer", "c_abstractor", "bimamba")
QUERIES = ("perceiver", "qformer")  # they start small, not at 0
OPTIONS = {"resampler_queries": 4, "resampler_heads": 4}  # of the queries: the blocks of a pool of 2, on a 4 x 4 grid


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
    return tokens.view(blocks.shape).mean((2, 4)).flatten(1, 2) if kind in (*QUERIES, "c_abstractor") else tokens


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
    assert difference.abs().max() < (0.03 if kind in QUERIES else 1e-5)
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
    assert kind in (*QUERIES, "c_abstractor") or after[True] > after[False] + 0.02


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


def random_resampler(make, kind, **options):
    """A resampler of random weights, and tokens of a view of 4 x 4, both in float64."""
    options = {"resampler_type": kind, "resampler_depth": 1, **OPTIONS, **options}
    resampler = make(**options)[0].model.resampler.double().eval()
    for parameter in resampler.parameters():
        nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    return resampler, torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        *(("mlp", (4, 4)), ("bimamba", (4, 4)), ("avg_pool", (2, 2)), ("c_abstractor", (2, 2))),
        *(("perceiver", (2, 2)), ("qformer", (2, 2))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_that_come_out_are_those_of_the_grid_in_every_dtype(make, kind, grid, dtype):
    model, _ = make(resampler_type=kind, **OPTIONS)
    assert model.config.token_grid == grid and model.config.tokens_per_view == grid[0] * grid[1]
    resampler = model.model.resampler.to(dtype).train()
    tokens = resampler(torch.randn(3, 16, 32, dtype=dtype))
    assert tokens.shape == (3, grid[0] * grid[1], 32) and tokens.dtype == dtype
    tokens.float().square().mean().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_at_one_place_moves_the_token_of_that_place_most(make, kind):
    model, _ = make(latent_dimension=64, resampler_type=kind, **OPTIONS)
    resampler = model.model.resampler.double()
    tokens = torch.randn(1, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    blocks = torch.arange(16) if len(resampler(tokens)[0]) == 16 else torch.tensor([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)
    for place in range(16):
        moved = tokens.clone()
        moved[0, place] += torch.randn(32, dtype=torch.float64)
        with torch.no_grad():
            change = (resampler(moved) - resampler(tokens))[0].square().sum(-1)
        assert int(change.argmax()) == blocks[place]


def test_the_qformer_is_that_of_blip2(make):
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    resampler, tokens = random_resampler(make, "qformer", resampler_depth=3)
    config = Blip2QFormerConfig(hidden_size=32, encoder_hidden_size=32, num_attention_heads=4, intermediate_size=128)
    config.num_hidden_layers, config.use_qformer_text_input = 3, False
    model = Blip2QFormerModel(config).double().eval()
    model.layernorm.load_state_dict(resampler.norm.state_dict())
    model.encoder.layer.load_state_dict(resampler.layers.state_dict())
    with torch.no_grad():
        context = resampler.input(tokens)
        queries = context.view(2, 2, 2, 2, 2, 32).mean((2, 4)).flatten(1, 2) + resampler.queries.weight
        expected = model(query_embeds=queries, encoder_hidden_states=context).last_hidden_state
        torch.testing.assert_close(resampler(tokens), expected)


def test_the_c_abstractor_is_convolutions_a_mean_and_convolutions(make):
    resampler, tokens = random_resampler(make, "c_abstractor")

    def block(grid, layer):  # [N, rows, columns, D], each cell a sum over the 7 x 7 around it
        rows, columns = grid.shape[1:3]
        around = torch.zeros(len(grid), rows + 6, columns + 6, 32, dtype=torch.float64)
        around[:, 3:-3, 3:-3] = grid
        kernel = layer.dwconv.weight[:, 0].permute(1, 2, 0)  # [7, 7, D]
        found = torch.stack(
            [
                torch.stack([(around[:, i : i + 7, j : j + 7] * kernel).sum((1, 2)) for j in range(columns)], 1)
                for i in range(rows)
            ],
            1,
        )
        found = found + layer.dwconv.bias
        found = (found - found.mean(-1, keepdim=True)) / (found.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        hidden = (found * layer.layernorm.weight + layer.layernorm.bias) @ layer.pwconv1.weight.T + layer.pwconv1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return grid + hidden @ layer.pwconv2.weight.T + layer.pwconv2.bias

    with torch.no_grad():
        grid = block(resampler.input(tokens).view(2, 4, 4, 32), resampler.before[0])
        grid = block(grid.view(2, 2, 2, 2, 2, 32).mean((2, 4)), resampler.behind[0])
        torch.testing.assert_close(resampler(tokens), resampler.norm(grid.flatten(1, 2)))


def test_the_bimamba_is_two_selective_state_spaces_in_opposite_directions(make):
    """Against the recurrence of the paper (arXiv:2405.21060, section 2), token after token: of each head
    h = exp(dt a) h + dt b x, y = c h + d x, then its gated norm."""
    resampler, tokens = random_resampler(make, "bimamba")
    layer = resampler.layers[0]

    def mixed(mixer, sequence):  # [S, D] -> [S, D]
        gate, x, step = (mixer.in_proj.weight @ sequence.T).split([64, 64 + 2 * 64, 1])  # one head of 64, state 64
        before = nn.functional.pad(x, (3, 0))
        kernel = mixer.conv1d.weight[:, 0]
        x = sum(kernel[:, k, None] * before[:, k : k + x.shape[1]] for k in range(4)) + mixer.conv1d.bias[:, None]
        x, b, c = (x * x.sigmoid()).split(64)
        step = torch.log1p(torch.exp(step + mixer.dt_bias))[0]  # [S]
        outputs, state = [], torch.zeros(64, 64, dtype=torch.float64)
        for t in range(x.shape[1]):
            state = (-step[t] * mixer.A_log.exp()).exp() * state + step[t] * torch.outer(x[:, t], b[:, t])
            outputs.append(state @ c[:, t] + mixer.D * x[:, t])
        gated = torch.stack(outputs) * (gate * gate.sigmoid()).T
        normed = gated / (gated.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).sqrt()
        return normed * mixer.norm.weight @ mixer.out_proj.weight.T

    with torch.no_grad():
        hidden = resampler.input(tokens)
        normed = layer.norm(hidden)
        expected = [
            one + mixed(layer.onward, of_it) + mixed(layer.reverse, of_it.flip(0)).flip(0)
            for one, of_it in zip(hidden, normed, strict=True)
        ]
        # transformers computes decay, states and norms in float32
        torch.testing.assert_close(resampler(tokens), resampler.norm(torch.stack(expected)), rtol=1e-3, atol=1e-4)


def test_state_spaces_start_as_mambas_do_however_a_model_is_made(make):
    config = make(resampler_type="bimamba")[0].config
    made = [PanoramaVLM(config), AutoModel.from_config(config, dtype=torch.bfloat16)]
    for model in made:
        for mixer in (model.model.resampler.layers[0].onward, model.model.resampler.layers[1].reverse):
            assert mixer.A_log.tolist() == [0.0] and mixer.D.tolist() == [1.0]  # one head
            steps = nn.functional.softplus(mixer.dt_bias.float())
            assert 0.0009 < steps.min() and steps.max() < 0.11 and not mixer.out_proj.weight.any()
