import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.train.config import TrainConfig
from panorama_vlm.train.data import ConversationCollator, VisionCollator, load_samples

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


@pytest.fixture
def start(make, tmp_path):
    """A folder with a tiny model and its processor."""
    model, processor = make(use_lora=False)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def launch(*arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "panorama_vlm.train"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_each_stage_is_one_command_trains_its_parts_and_starts_from_the_one_before(start, tmp_path, panoramas, ask):
    model = start
    changed_parts = {
        "vision": {"resampler", "vicreg_projector"},
        "resampler": {"resampler", "projection"},
        "finetune": {"resampler", "projection", "language_model"},
    }
    for stage, expected in changed_parts.items():
        output = tmp_path / stage
        options = ["--epochs", 1, "--batch_size", 8, "--learning_rate", 1e-3, "--log_every", 1]
        run = launch("--stage", stage, "--model", model, "--data", SAMPLES, "--output", output, *options)
        assert run.returncode == 0, run.stderr
        assert "it/s, loss=" in run.stderr  # the progress bar
        assert ("retrieval=" in run.stderr and "effective_rank=" in run.stderr) == (stage == "vision")
        before, after = PanoramaVLM.from_pretrained(model), PanoramaVLM.from_pretrained(output)
        weights = dict(before.named_parameters())
        changed = {name.split(".")[0] for name, p in after.named_parameters() if not torch.equal(p, weights[name])}
        assert changed == expected
        model = output
    processor = PanoramaProcessor.from_pretrained(model)
    assert after.generate(**ask(processor, panoramas[0]), max_new_tokens=2).shape[0] == 1


@pytest.mark.slow
def test_the_vision_stage_lowers_its_loss_and_a_lora_finetune_memorises(start, tmp_path):
    from panorama_vlm.train.loop import train

    common = {"data": str(SAMPLES), "batch_size": 4, "learning_rate": 3e-3}
    losses = train(TrainConfig(stage="vision", model=str(start), output=str(tmp_path / "vision"), epochs=10, **common))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    options = json.dumps({"use_lora": True, "lora_rank": 8})
    losses = train(
        TrainConfig("finetune", output=str(tmp_path / "lora"), model=str(start), options=options, epochs=4, **common)
    )
    assert losses[-1] < losses[0]
    assert not PanoramaVLM.from_pretrained(tmp_path / "lora").has_lora


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs must be positive, got 0"),
        ({"learning_rate": -1.0}, "--learning_rate must be positive"),
        ({"warmup_ratio": 1.0}, r"--warmup_ratio must be in \[0, 1\)"),
        ({"model": None}, "give --model, or both --vision and --language"),
        ({"vision": "a"}, "leave them out with --model"),
        ({"data": "nowhere"}, "metadata.jsonl' does not exist"),
        ({"options": "{"}, "--options must be JSON"),
        ({"options": "[1]"}, "--options must be a JSON object"),
    ],
)
def test_wrong_options_are_found_before_anything_is_loaded(options, message):
    config = TrainConfig(**{"stage": "vision", "data": str(SAMPLES), "output": "x", "model": "m", **options})
    with pytest.raises(ValueError, match=message):
        config.check()


def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path):
    arguments = ["--stage", "vision", "--data", str(tmp_path), "--output", "x", "--model", "m"]
    run = subprocess.run([sys.executable, "-m", "panorama_vlm.train", *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: --data needs a folder with metadata.jsonl")


def test_samples_have_their_panorama_question_and_answer(samples):
    loaded = load_samples(str(SAMPLES))
    assert len(loaded) == 48
    assert loaded[5]["query"] == samples[5]["query"]
    assert loaded[5]["image"].size == (512, 256)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_name": "a.jpg", "query": "q"}, r"lacks the fields \['annotation'\]"),
        ({"file_name": "a.jpg", "query": "q", "annotation": "a"}, "1 panoramas of metadata.jsonl do not exist"),
    ],
)
def test_data_that_lacks_something_is_refused(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        load_samples(str(tmp_path))


def test_batches_hold_what_their_stage_needs(make):
    _, processor = make()
    rows = [load_samples(str(SAMPLES))[i] for i in (0, 1)]
    assert set(VisionCollator(processor, 0)(rows)) == {"pixel_values"}
    batch = ConversationCollator(processor)(rows)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels"}


def test_the_vision_stage_sees_each_panorama_under_a_new_heading(make):
    _, processor = make()
    rows = [load_samples(str(SAMPLES))[0]]
    collate = VisionCollator(processor, 0)
    assert not torch.equal(collate(rows)["pixel_values"], collate(rows)["pixel_values"])
