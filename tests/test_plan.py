"""What the plan says beside what a real step on the CPU costs."""

import gc
import json
import math

import pytest
import torch
from panorama_vlm import PanoramaVLM
from panorama_vlm.plan import Text, main, panorama_config, plan_run, plan_stage, simulate
from panorama_vlm.train.build import checkpoint_activations, load_start
from panorama_vlm.train.config import load_config
from panorama_vlm.train.optimizers import make_optimizer
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

BATCH, TEXT = 4, Text(tokens=64, answer=32)
LANGUAGE = (
    "{model_type: llama, hidden_size: 64, intermediate_size: 256, num_hidden_layers: 4, num_attention_heads: 2, "
    "num_key_value_heads: 2, tie_word_embeddings: true, vocab_size: 300}"
)


def run_of(*options):
    return load_config(["tiny.yaml", "--compose.language", LANGUAGE, *options])


def real_step(config, options, stage, recompute=False, attention=None):
    """A model with weights, its optimizer, and one step of it on a padded batch."""
    torch.manual_seed(0)
    model = PanoramaVLM(config)
    if attention is not None:
        model.set_attn_implementation(attention)
    model.set_stage(stage)
    if recompute:
        checkpoint_activations(model)
    optimizer = make_optimizer(model, options)
    pixels = torch.randn(BATCH, config.num_views, 3, config.image_size, config.image_size)
    placeholders = torch.full((BATCH, config.num_image_tokens), config.image_token_id)
    ids = torch.cat([placeholders, torch.randint(1, 300, (BATCH, TEXT.tokens))], 1)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : -TEXT.answer], mask[0, 0] = -100, 0
    inputs = {"pixel_values": pixels}
    if stage != "vision":
        inputs |= {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def step():
        model(**inputs, stage=stage).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    there = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *kept, pixels])
    return model, step, there


def peak_of(step):
    """Bytes that the allocator handed out at most, above where it began."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events, left = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(events):
        now += size
        peak = max(peak, now)
    return peak


SOAK = pytest.mark.soak  # seconds each: made without content, but made
STAGES = ["vision", *(pytest.param(stage, marks=SOAK) for stage in ("resampler", "finetune"))]


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_those_of_the_model_that_is_trained(stage):
    run = load_config(["tiny.yaml"])
    model, _ = load_start(run)
    trained = model.set_stage(stage)
    plan = plan_stage(panorama_config(run), run, stage, TEXT)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.trained == sum(parameter.numel() for name, parameter in model.named_parameters() if name in trained)
    assert (plan.views, plan.image_tokens) == (model.config.num_views, model.config.num_image_tokens)
    assert plan.gradients == 4 * plan.trained and plan.optimizer_state == 8 * plan.trained


@pytest.mark.parametrize(
    "stage, recompute",
    [("vision", False), *(pytest.param(*run, marks=SOAK) for run in (("resampler", False), ("finetune", True)))],
)
def test_flops_are_those_that_a_real_step_is_counted_to_make(stage, recompute):
    run = run_of("--attention", "eager", "--options.vision_trainable_blocks", "1")
    config, options = panorama_config(run), run.stage_config(stage)
    planned = simulate(config, stage, options, BATCH, TEXT, "no", recompute, "eager").flops
    _, step, _ = real_step(config, options, stage, recompute, "eager")
    with FlopCounterMode(display=False) as counter:
        step()
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_a_language_model_that_trains_whole_are_those_of_the_papers():
    """6 N + 12 L H Q T a token (PaLM, appendix B): N weights of matrices, L layers, H heads of Q dimensions."""
    body = (
        "{model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 4, num_attention_heads: 8, "
        "num_key_value_heads: 8, tie_word_embeddings: false, vocab_size: 50}"
    )
    run = load_config(["tiny.yaml", "--compose.language", body, "--options.use_lora", "false"])
    config = panorama_config(run)
    with torch.device("meta"):
        language = PanoramaVLM(config).model.language_model
    weights = sum(parameter.numel() for name, parameter in language.named_parameters() if parameter.ndim == 2)
    weights -= language.get_input_embeddings().weight.numel()
    tokens = config.num_image_tokens + 400
    planned = [
        simulate(config, "finetune", run.finetune, 1, Text(text, 1), "no", attention="eager").flops
        for text in (400, 200)
    ]
    longer, shorter = ((6 * weights + 12 * 4 * 256 * count) * count for count in (tokens, tokens - 200))
    assert planned[0] - planned[1] == pytest.approx(longer - shorter, rel=0.02)


@pytest.mark.soak
@pytest.mark.parametrize("stage, recompute", [("vision", False), ("resampler", True), ("finetune", False)])
def test_the_peak_is_at_most_three_tenths_above_the_measured_one_and_not_below_it(stage, recompute):
    run = run_of("--options.use_lora", "false")
    config, options = panorama_config(run), run.stage_config(stage)
    planned = simulate(config, stage, options, BATCH, TEXT, "no", recompute, foreach=False).peak
    _, step, there = real_step(config, options, stage, recompute)
    measured = there + peak_of(step)
    print(f"{stage}, {recompute=}: planned {planned / 2**20:.2f} MiB, measured {measured / 2**20:.2f} MiB")
    assert measured * 0.99 <= planned <= measured * 1.3


@pytest.mark.soak
def test_half_precision_costs_less_memory():
    run = run_of("--options.use_lora", "false")
    config = panorama_config(run)
    whole, half = (simulate(config, "finetune", run.finetune, 2, TEXT, precision) for precision in ("no", "bf16"))
    assert half.activations < 0.8 * whole.activations and half.flops == whole.flops


@pytest.mark.soak
def test_recomputation_costs_time_and_muon_keeps_less():
    run = run_of("--finetune.optimizer", "muon", "--options.use_lora", "false")
    plan = plan_stage(panorama_config(run), run, "finetune", TEXT)
    kept, recomputed = plan.passes[False], plan.passes[True]
    assert recomputed.activations < 0.4 * kept.activations and recomputed.peak < kept.peak
    assert kept.flops < recomputed.flops
    assert 4 * plan.trained < plan.optimizer_state < 8 * plan.trained


def test_nothing_without_content_is_left_behind(make):
    """What a model computes once and keeps is real again afterwards."""
    run = run_of()
    config = panorama_config(run)
    simulate(config, "resampler", run.resampler, 1, TEXT)
    model = PanoramaVLM(config)
    assert torch.isfinite(model.get_image_features(torch.randn(1, 9, 3, 32, 32)).pooler_output).all()


def test_the_command_prints_a_table(capsys):
    options = ["--stage", "vision", "--gpu-memory", "1"]
    main(["tiny.yaml", *options])
    out = capsys.readouterr().out
    assert "mixed precision 'bf16', 128 tokens of text" in out
    for name in ("parameters", "  trained", "FLOPs a step, checkpointed", "optimizer state", "  largest micro-batch"):
        assert any(line.startswith(name) for line in out.splitlines()), out


@pytest.mark.soak
def test_a_saved_folder_is_planned_without_its_weights(make, tmp_path, capsys):
    model, _ = make()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    main([str(tmp_path), "--stage", "resampler"])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e3:.2f} k" in capsys.readouterr().out


def test_what_cannot_be_found_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["siglip2_qwen3.yaml"])
    words = capsys.readouterr().err
    assert "'google/siglip2-base-patch16-256' is no folder here" in words and "--compose.vision FOLDER" in words
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 1, "vocab_size": 99}))
    shapes = "{model_type: siglip_vision_model, image_size: 64, num_hidden_layers: 1}"
    given = ["siglip2_qwen3.yaml", "--compose.vision", shapes, "--compose.language", str(tmp_path)]
    assert panorama_config(load_config(given)).text_config.num_hidden_layers == 1  # its config.json is enough
    for wrong in (["--answer-tokens", "128"], ["--gpu-memory", "0"], ["--no-such-option", "1"]):
        with pytest.raises(SystemExit):
            main(["tiny.yaml", *wrong])
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny.yaml", "--gpu-memory", "nan"], "gpu_memory must be a finite number, got nan"),
        (["tiny.yaml", "--gpu-memory", "inf"], "gpu_memory must be a finite number, got inf"),
        (["tiny.yaml", "--gpu-memory", "-1"], "gpu_memory must be positive, got -1.0"),
        (["tiny.yaml", "--gpu-memory", "1e300"], "gpu_memory must be at most 1048576 GiB, got 1e+300"),
        (["tiny.yaml", "--text-tokens", "100000000000000"], "100000000000000 tokens of text"),
        (["tiny.yaml", "--vision.batch_size", "1000000000"], "1000000000 samples of 128 tokens of text (vision.batch"),
        (["tiny.yaml", "--compose.vision", "5"], "compose.vision must be a Hub id, a folder, or a configuration"),
        (["tiny.yaml", "--compose.vision", "{model_type: x}"], "compose.vision {'model_type': 'x'"),
        (["tiny.yaml", "--compose.language", "{hidden_size: -1}"], "'hidden_size': -1"),
        (["smolvlm_256m.yaml"], "compose.vlm: 'HuggingFaceTB/SmolVLM"),  # a ready file, and ended with a TypeError
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_folder_without_a_model_is_not_planned_as_the_default_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_options_of_a_plan_are_checked_where_it_is_called_too():
    for wrong in (-1, 0, 1.5, math.nan, "x", None):
        with pytest.raises(ValueError, match="tokens of text must be"):
            Text(tokens=wrong)
    with pytest.raises(ValueError, match="tokens of an answer must be at most those of the text, 4, got 5"):
        Text(4, 5)
    with pytest.raises(ValueError, match="precision must be one of"):
        plan_run(run_of(), precision="fp8")
