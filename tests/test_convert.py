"""A checkpoint of PanoLLaVA v1.0, of tiny parts, moved over: beside a plain reference of v1.0's modules."""

import copy
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.tests.conftest import LANGUAGE, TOWER
from panorama_vlm.train.convert import Report, _options, _settings, convert, main, read_old
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

LATENT, HIDDEN = 24, 40


def mlp(widths, norms=True):
    """v1.0's: linear layers, each but the last with a layer norm and GELU behind it."""
    layers = []
    for before, after in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if norms else []), nn.GELU()]
    holder = nn.Module()
    holder.mlp = nn.Sequential(*layers, nn.Linear(*widths[-2:]))
    return holder


class BatchNormMLP(nn.Module):
    """v1.0's first resampler."""

    def __init__(self):
        super().__init__()
        self.linear1, self.bn1, self.linear2 = nn.Linear(32, LATENT), nn.BatchNorm1d(LATENT), nn.Linear(LATENT, LATENT)

    def mlp(self, x):
        flat = self.linear1(x).flatten(0, -2)
        return self.linear2(nn.functional.gelu(self.bn1(flat))).unflatten(0, x.shape[:-1])


class Reference(nn.Module):
    """v1.0's parts under its names."""

    def __init__(self, vocab_size, resampler, projector_reads=LATENT, norm=False, depth=3):
        super().__init__()
        self.vision_encoder = AutoModel.from_config(AutoConfig.for_model(**TOWER))
        self.vicreg_norm = nn.LayerNorm(32) if norm else nn.Identity()
        self.resampler = resampler
        self.vicreg_projector = mlp([projector_reads, 48, 20])
        self.vision_to_language_projection = nn.Linear(LATENT, 32)
        self.language_model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**LANGUAGE, "vocab_size": vocab_size})
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
        self.eval()

    @torch.no_grad()
    def resampled(self, images):
        return self.resampler.mlp(self.vicreg_norm(self.vision_encoder(images).last_hidden_state))


@pytest.fixture
def parts(tokenizer, tmp_path):
    """Folders of the tower's and the language model's configurations, and what v1.0's tokenizer had in the end."""
    AutoConfig.for_model(**TOWER).save_pretrained(tmp_path / "vision")
    AutoConfig.for_model(**{**LANGUAGE, "vocab_size": len(tokenizer)}).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    old = copy.deepcopy(tokenizer)
    old.add_special_tokens({"additional_special_tokens": ["<|vision|>", "<|endoftext|>"]})
    return tmp_path / "vision", tmp_path / "language", old


@pytest.fixture
def old(parts, tmp_path):
    """`old(resampler)` -> the reference and the path of its Lightning checkpoint."""

    def build(resampler=None, lora=False, prefix="model.", **options):
        torch.manual_seed(0)
        vision, language, words = parts
        reference = Reference(len(words), resampler or mlp([32, HIDDEN, HIDDEN, LATENT]), **options)
        settings = {
            "vision_name": str(vision),
            "language_model_name": str(language),
            "resampler_type": "mlp",
            "latent_dimension": LATENT,
            "overlap_ratio": 0.5,
            "vicreg_loss_weight": 0.0,
            "max_text_length": 256,
            "stage": "finetune",
            "lr": 2e-6,
        }
        if lora:
            targets = ["q_proj", "v_proj", "down_proj"]
            config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
            reference.language_model = get_peft_model(reference.language_model, config)
            for name, parameter in reference.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.3)
            settings["use_lora_cfg"] = {"use_lora": True, "rank": 4, "alpha": 12, "dropout": 0.1}
            reference.eval()
        weights = {prefix + name: value.clone() for name, value in reference.state_dict().items()}
        content = {"epoch": 2, "global_step": 7, "pytorch-lightning_version": "2.5.0", "state_dict": weights}
        content |= {"hyper_parameters": settings, "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}]}
        content["datamodule_hyper_parameters"] = {
            "crop_strategy": "anyres_e2p",
            "image_size": (64, 64),
            "batch_size": 2,
        }
        torch.save(content, tmp_path / "old.ckpt")
        return reference, tmp_path / "old.ckpt"

    return build


@torch.no_grad()
def same_text(model, reference, words):
    """Logits of text as v1.0's language model gives them; that of `<image>` is the lowest."""
    ids = torch.tensor([words("Where is the river that the bridge leads over?").input_ids])
    expected = reference.language_model(input_ids=ids).logits
    logits = model(input_ids=ids).logits[..., : expected.shape[-1]]
    image = model.config.image_token_id
    assert image == words.convert_tokens_to_ids("<|vision|>")
    rest = [i for i in range(expected.shape[-1]) if i != image]
    torch.testing.assert_close(logits[..., rest], expected[..., rest])


@torch.no_grad()
def same_tokens(model, reference):
    images = torch.randn(2, 3, 64, 64)
    expected = reference.resampled(images)
    tokens = model.model.encode_views(images[None])[0]
    torch.testing.assert_close(tokens, expected)
    shown = model.model.projection.layers(tokens)
    torch.testing.assert_close(shown, reference.vision_to_language_projection(expected))


def test_weights_text_and_tokens_are_the_same(old, parts, tmp_path, panoramas, ask):
    reference, path = old()
    report = convert(path, tmp_path / "new")
    assert report.is_whole
    assert [name for name, _, _ in report.needless] == ["vicreg_projector.mlp.3.bias"]
    assert report.carried == len(reference.state_dict()) - 1
    model = PanoramaVLM.from_pretrained(tmp_path / "new").eval()
    same_text(model, reference, parts[2])
    same_tokens(model, reference)
    config = model.config
    assert (config.resampler_type, config.resampler_depth, config.resampler_hidden) == ("mlp_v1", 3, HIDDEN)
    assert (config.view_strategy, config.image_size, config.token_selection) == ("anyres_e2p", 64, "all")
    features = torch.randn(2, 5, LATENT)
    bias = reference.vicreg_projector.mlp[-1].bias
    torch.testing.assert_close(model.vicreg_projector(features), reference.vicreg_projector.mlp(features) - bias)
    processor = PanoramaProcessor.from_pretrained(tmp_path / "new")
    inputs = ask(processor, panoramas[0])
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    card = (tmp_path / "new" / "README.md").read_text()
    assert "PanoLLaVA v1.0 checkpoint `old.ckpt`" in card and "position code" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    "resampler, options",
    [
        (lambda: mlp([32, LATENT]), {}),
        (lambda: mlp([32, HIDDEN, LATENT], norms=False), {}),
        (lambda: mlp([32, 32, LATENT]), {"norm": True}),
        (BatchNormMLP, {}),
    ],
    ids=["one layer", "no norms", "norm of the tower's tokens", "batch norm"],
)
def test_every_mlp_of_v1_gives_the_same_tokens(resampler, options, old, tmp_path):
    reference, path = old(resampler(), **options)
    assert convert(path, tmp_path / "new").is_whole
    same_tokens(PanoramaVLM.from_pretrained(tmp_path / "new").eval(), reference)


@pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod."])
def test_names_behind_a_prefix_and_a_plain_state_dict(prefix, old, parts, tmp_path):
    reference, _ = old(prefix=prefix)
    weights = {prefix + name: value.clone() for name, value in reference.state_dict().items()}
    tied = f"{prefix}language_model.lm_head.weight"
    named = {"vision": str(parts[0]), "language": str(parts[1])}
    for kind in ("pt", "safetensors"):
        path = tmp_path / f"weights.{kind}"
        torch.save(weights, path) if kind == "pt" else save_file({n: v for n, v in weights.items() if n != tied}, path)
        report = convert(path, tmp_path / kind, **named)
        assert report.is_whole and any("no crop_strategy" in each for each in report.differences)
        same_text(PanoramaVLM.from_pretrained(tmp_path / kind).eval(), reference, parts[2])
    with pytest.raises(ValueError, match="--vision with a Hub id or a folder"):
        convert(path, tmp_path / "new")


def test_later_layouts_hold_a_part_twice(old, tmp_path):
    _, path = old()
    content = torch.load(path)
    weights = content["state_dict"]
    for name in list(weights):
        for part, also in (
            ("resampler", "resampler_module.resampler"),
            ("vision_to_language_projection", "projector.linear"),
        ):
            if name.startswith(f"model.{part}."):
                weights[name.replace(f".{part}.", f".{also}.")] = weights[name]
        if "vision_encoder" in name:
            weights[name.replace("vision_encoder", "vision_backbone.encoder")] = weights.pop(name)
    torch.save(content, path)
    report = convert(path, tmp_path / "new")
    assert report.is_whole and sum("the same tensor" in reason for _, _, reason in report.needless) == 12
    weights["model.projector.linear.bias"] = weights["model.projector.linear.bias"] + 1
    torch.save(content, path)
    with pytest.raises(ValueError, match="bias .* is there twice, with different values"):
        convert(path, tmp_path / "other")


def test_lora_is_merged_and_kept(old, parts, tmp_path):
    reference, path = old(lora=True)
    report = convert(path, tmp_path / "new", keep_adapter=True)
    assert report.is_whole
    merged = PanoramaVLM.from_pretrained(tmp_path / "new").eval()
    same_text(merged, reference, parts[2])
    with reference.language_model.disable_adapter():
        same_text(PanoramaVLM.from_pretrained(tmp_path / "new" / "base").eval(), reference, parts[2])
    os.rename(tmp_path / "new", tmp_path / "moved")
    adapted = PanoramaVLM.from_checkpoint(tmp_path / "moved" / "adapter").eval()
    assert adapted.has_lora
    same_text(adapted, reference, parts[2])
    adapted.add_lora()  # trains on
    assert (adapted.config.lora_rank, adapted.config.lora_alpha) == (4, 12)


def test_alpha_of_lora_is_never_guessed(old, parts, tmp_path):
    reference, path = old(lora=True)
    content = torch.load(path)
    del content["hyper_parameters"]["use_lora_cfg"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="--lora-alpha"):
        convert(path, tmp_path / "new")
    convert(path, tmp_path / "new", lora_alpha=12)
    same_text(PanoramaVLM.from_pretrained(tmp_path / "new").eval(), reference, parts[2])


def test_what_has_no_place_is_named_and_fails(old, tmp_path, capsys):
    reference, path = old(projector_reads=32)
    content = torch.load(path)
    weights = content["state_dict"]
    weights["model.text_projection.weight"] = torch.zeros(32, 32)
    weights["model.vision_encoder.encoder.layers.0.extra"] = torch.zeros(3)
    del weights["model.vision_encoder.post_layernorm.bias"]
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        convert(path, tmp_path / "new")
    words = str(error.value)
    for line in (
        r"model\.text_projection\.weight \[32, 32\]: stage 2's layer",
        r"vision_encoder\.encoder\.layers\.0\.extra \[3\]: a SiglipVisionModel has none",
        r"vicreg_projector\.mlp\.0\.weight \[48, 32\]: v1\.0's stood on the tower's tokens",
        r"vision_encoder\.post_layernorm\.bias \[32\]: nothing in the checkpoint",
    ):
        assert re.search(line, words), words
    assert "--partial" in words and not (tmp_path / "new").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(path), str(tmp_path / "new")])
    assert capsys.readouterr().err.startswith("error: the checkpoint cannot be carried over whole")
    main([str(path), str(tmp_path / "new"), "--partial", "--option", "view_strategy=e2p"])
    assert "Not carried over:" in capsys.readouterr().out
    model = PanoramaVLM.from_pretrained(tmp_path / "new")
    assert model.vicreg_projector is None and model.config.view_strategy == "e2p"
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(path, tmp_path / "new", partial=True)
    assert "`model.text_projection.weight` [32, 32]" in (tmp_path / "new" / "README.md").read_text()


def test_another_resampler_is_named_and_what_is_around_it_kept(old, parts, tmp_path):
    qformer = nn.Module()
    qformer.query, qformer.proj = nn.Parameter(torch.randn(1, 4, 32)), nn.Linear(32, LATENT)
    reference, path = old(qformer)
    with pytest.raises(ValueError, match=r"resampler\.query \[1, 4, 32\]: v1.0's qformer"):
        convert(path, tmp_path / "new")
    report = convert(path, tmp_path / "new", partial=True)
    assert all(name.startswith("model.resampler.") for name, _, _ in report.missing)
    model = PanoramaVLM.from_pretrained(tmp_path / "new").eval()
    same_text(model, reference, parts[2])
    torch.testing.assert_close(model.model.projection.layers[0].weight, reference.vision_to_language_projection.weight)


def test_code_truncated_files_and_other_models_are_refused(old, parts, tmp_path):
    _, path = old()
    whole = path.read_bytes()
    cut = tmp_path / "cut.ckpt"
    for share in (0.0, 0.3, 0.99):
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match="cut.ckpt' is truncated or no checkpoint"):
            read_old(cut)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match="cut.safetensors' is truncated"):
        read_old(tmp_path / "cut.safetensors")
    marker = tmp_path / "it-ran"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for archive in (True, False):
        torch.save({"state_dict": {}, "hook": Code()}, cut, _use_new_zipfile_serialization=archive)
        with pytest.raises(ValueError, match="holds more than weights .*mkdir.*could run code"):
            read_old(cut)
    assert not marker.exists()
    with pytest.raises(ValueError, match="there is no checkpoint"):
        read_old(tmp_path / "none.ckpt")
    AutoConfig.for_model(**{**LANGUAGE, "hidden_size": 64}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another model was named"):
        convert(path, tmp_path / "new", language=str(tmp_path / "other"), tokenizer=str(parts[1]))
    with pytest.raises(ValueError, match="no-such/model' is no folder here .* --language"):
        convert(path, tmp_path / "new", language="no-such/model")


def test_options_beside_the_checkpoint(old, tmp_path):
    _, path = old()
    content = torch.load(path)
    names = {name: content["hyper_parameters"].pop(name) for name in ("vision_name", "language_model_name")}
    del content["datamodule_hyper_parameters"]
    torch.save(content, path)
    models = {"vision_name": names["vision_name"], "lm_model": names["language_model_name"]}
    settings = {"models": models, "image_processing": {"crop_strategy": "cubemap", "image_size": [64, 64]}}
    (tmp_path / "model_config.json").write_text(json.dumps(settings))
    convert(path, tmp_path / "new")
    assert PanoramaVLM.from_pretrained(tmp_path / "new").config.view_strategy == "cubemap"


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    """Wrong bytes of a pickle ended in the errors of its reader: IndexError, struct.error, AssertionError, ..."""
    state = {"model.weight": torch.ones(3, 4), "b": torch.ones(2)}
    whole = {"state_dict": state, "hyper_parameters": {"lr": 1e-3, "sizes": [1, 2]}}
    for archive in (True, False):
        torch.save(whole, tmp_path / "whole", _use_new_zipfile_serialization=archive)
        data, read = (tmp_path / "whole").read_bytes(), 0
        for case in range(400):
            rng = np.random.default_rng(case)
            damaged, place = bytearray(data), int(rng.integers(len(data)))
            match case % 4:
                case 0:
                    damaged[place] = rng.integers(256)
                case 1:
                    damaged = damaged[: max(1, place)]
                case 2:
                    del damaged[place : place + int(rng.integers(1, 9))]
                case 3:
                    damaged[place:place] = damaged[place : place + 9]
            (tmp_path / "old.ckpt").write_bytes(damaged)
            try:
                read_old(tmp_path / "old.ckpt")
                read += 1
            except ValueError as error:
                assert "old.ckpt" in str(error)
        assert 0 < read < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": 5}, "state_dict of .*old.ckpt.* must be a dict, got a int"),
        ({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": [1]}, "hyper_parameters of .* must be a dict"),
        ({"a": torch.ones(1), "datamodule_hyper_parameters": "x"}, "datamodule_hyper_parameters of .* must be a dict"),
        ({3: torch.ones(1)}, "must have names, got 3"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=words):
        read_old(tmp_path / "old.ckpt")


def test_options_of_v1_of_the_wrong_kind_are_refused_by_name(tmp_path):
    """An image_size of "22" was two pixels."""
    for size in ("22", "224", 224.5, True, [224, None], -1, math.nan):
        with pytest.raises(ValueError, match="image_size of v1.0 must be"):
            _options({"image_size": size}, Report())
    assert _options({"image_size": 224.0, "crop_strategy": ["e2p"]}, Report())["image_size"] == 224
    (tmp_path / "model_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="model_config.json' must be a JSON file of v1.0's options, and holds a list"):
        _settings({}, None, tmp_path / "old.ckpt")
