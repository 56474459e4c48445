"""The trainer as its users run it: commands, folders, files."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.checkpoint_panorama import read_state
from panorama_vlm.data.skipped import TooManyBadSamples
from panorama_vlm.stages_panorama import part_of
from panorama_vlm.tests.launching import ENVIRONMENT, SAMPLES, launch, metrics, run_here
from panorama_vlm.train.build import check_parts
from panorama_vlm.train.checkpoint import newest_checkpoint, whole_folder
from panorama_vlm.train.config import CONFIGS, describe, load_config, save_config
from panorama_vlm.train.loop import train
from panorama_vlm.train.signals import PREEMPTED
from safetensors.torch import load_file

NO_DROPOUT = "{latent_dimension: 32, lora_dropout: 0.0, overlap_loss_weight_finetune: 0.1}"

STABLE = ["--vision.schedule", "warmup_stable_decay"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run of tiny.yaml with a validation share."""
    output = tmp_path_factory.mktemp("trained")
    options = ["--validation_share", 0.2, "--eval_every", 3, "--keep_checkpoints", 1, "--trackers", "[tensorboard]"]
    losses = run_here(output, *options)
    return output, losses


# What a run leaves


@pytest.mark.slow
def test_a_run_of_three_stages_leaves_folders_that_load_and_says_what_it_did(trained, ask, panoramas):
    output, losses = trained
    assert [len(losses[stage]) for stage in ("vision", "resampler", "finetune")] == [8, 6, 6]
    before = None
    changed_parts = {
        "vision": None,
        "resampler": {"resampler", "projection"},
        "finetune": {"resampler", "projection", "language_model"},
    }
    for stage, expected in changed_parts.items():
        after = PanoramaVLM.from_pretrained(output / stage)
        assert not after.has_lora
        if before is not None:
            weights = dict(before.named_parameters())
            changed = {part_of(n) for n, p in after.named_parameters() if not torch.equal(p, weights[n])}
            assert changed == expected
        before = after
        card = (output / stage / "README.md").read_text()
        assert "library_name: transformers" in card and str(output) not in card
        assert (output / stage / "loss_curve.png").stat().st_size > 1000
        assert metrics(output, stage) == pytest.approx(losses[stage])
        assert len(metrics(output, stage, "eval_loss")) >= 2
    processor = PanoramaProcessor.from_pretrained(output / "finetune")
    assert after.generate(**ask(processor, panoramas[0]), max_new_tokens=2).shape[0] == 1

    line = json.loads((output / "logs/finetune/metrics.jsonl").read_text().splitlines()[0])
    wanted = {"loss", "ar_loss", "overlap_loss", "grad_norm", "tokens_per_second", "panoramas_per_second", "waiting"}
    assert wanted | {"memory_gib", "learning_rate/language_model", "epoch"} <= set(line)
    assert {"retrieval", "effective_rank", "invariance", "variance", "covariance"} <= set(
        json.loads((output / "logs/vision/metrics.jsonl").read_text().splitlines()[0])
    )
    answers = [json.loads(text) for text in (output / "logs/finetune/samples.jsonl").read_text().splitlines()]
    assert {"step", "image", "question", "answer", "reference", "trained"} == set(answers[0])
    assert [answer["step"] for answer in answers] == [3, 3, 6, 6]
    assert list(output.rglob("events.out.tfevents*"))
    again = load_config([str(output / "config.yaml")])
    assert again == load_config([str(output / "config.yaml"), "--stage", "all"])


@pytest.mark.slow
def test_the_best_and_the_newest_checkpoint_are_kept(trained):
    output, _ = trained
    for stage in ("vision", "resampler", "finetune"):
        kept = {path.name for path in (output / "checkpoints").glob(f"{stage}-*")}
        states = [read_state(output / "checkpoints" / name) for name in kept]
        newest = max(states, key=lambda state: state["step"])
        assert kept == {f"{stage}-{newest['step']:07d}", f"{stage}-{newest['best'][1]:07d}"}


@pytest.mark.slow
def test_a_finished_run_does_nothing_and_another_one_does_not_overwrite_it(trained):
    output, _ = trained
    weights = (output / "finetune/model.safetensors").stat().st_mtime_ns
    assert train(load_config([str(output / "config.yaml")])) == {}
    assert (output / "finetune/model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(ValueError, match="holds a run: choose another --output"):
        train(load_config([str(output / "config.yaml"), "--resume", "never"]))
    (newest,) = [path for path in (output / "checkpoints").glob("finetune-0000006")]
    folder = output / "finetune"
    folder.rename(output / "moved")
    try:
        with pytest.raises(ValueError, match="seed was 0 and is 1"):
            train(load_config([str(output / "config.yaml"), "--seed", "1"]))
        assert train(load_config([str(output / "config.yaml"), "--resume", str(newest)])) == {"finetune": []}
        assert same_weights(folder, output / "moved")
    finally:
        shutil.rmtree(output / "moved", ignore_errors=True)


def same_weights(first, second):
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Loading


@pytest.mark.slow
def test_from_checkpoint_tells_a_checkpoint_a_folder_and_adapters_apart(trained, ask, panoramas, caplog):
    output, _ = trained
    processor = PanoramaProcessor.from_pretrained(output / "finetune")
    inputs = ask(processor, panoramas[0])
    expected = PanoramaVLM.from_pretrained(output / "finetune").eval()(**inputs).logits
    caplog.set_level("INFO", "panorama_vlm")
    kinds = {
        output / "finetune": "is a saved folder",
        output / "finetune/adapter": "holds LoRA adapters",
        output / "checkpoints/finetune-0000006": "is a training checkpoint: stage finetune, step 6",
    }
    for path, words in kinds.items():
        caplog.clear()
        model = PanoramaVLM.from_checkpoint(path).eval()
        assert words in caplog.text
        assert model.has_lora == ("saved folder" not in words)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        model.merge_lora()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is no training checkpoint .* or PEFT adapter folder"):
        PanoramaVLM.from_checkpoint(output / "logs")
    with pytest.raises(ValueError, match="no such folder"):
        PanoramaVLM.from_checkpoint(output / "nowhere")


@pytest.mark.slow
def test_peft_loads_the_adapters_onto_the_language_model(trained):
    from peft import PeftModel

    output, _ = trained
    base, tuned = (PanoramaVLM.from_pretrained(output / stage) for stage in ("resampler", "finetune"))
    merged = PeftModel.from_pretrained(base.model.language_model, output / "finetune/adapter").merge_and_unload()
    for name, weight in tuned.model.language_model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight)


# The same run, however it is spread


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "batch_size", "accumulation"), [("vision", 5, 1), pytest.param("finetune", 1, 5, marks=pytest.mark.soak)]
)
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(tmp_path, stage, batch_size, accumulation):
    common = ["tiny.yaml", "--stage", stage, "--options", NO_DROPOUT, f"--{stage}.max_steps", 20]
    common += ["--save_every", 1000, "--eval_samples", 0]
    # Ten samples a step: of 12 panoramas or 48 questions the last batch of an epoch has two or eight.
    losses = []
    for processes, batch in ((1, (10, 1)), (2, (batch_size, accumulation))):
        output = tmp_path / str(processes)
        options = [f"--{stage}.batch_size", batch[0], f"--{stage}.accumulation", batch[1]]
        run = launch(*common, "--output", output, *options, processes=processes)
        assert run.returncode == 0, run.stderr[-3000:]
        assert f"on {processes} process" in run.stderr
        losses.append(torch.tensor(metrics(output, stage), dtype=torch.float64))
    assert len(losses[0]) == 20 and losses[0].std() > 1e-3  # it learns, so what it learned from shows
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_accumulated_losses_are_normalised_by_all_supervised_tokens(tmp_path):
    """Against the loss of the whole batch in one piece, written plainly."""
    from panorama_vlm.data.collators import ConversationCollator
    from panorama_vlm.data.samples import open_data
    from panorama_vlm.data.stream import BatchStream
    from panorama_vlm.train.build import load_start

    options = ["--stage", "resampler", "--resampler.batch_size", 1, "--resampler.accumulation", 7]
    options += ["--resampler.max_steps", 1, "--options", NO_DROPOUT]
    losses = run_here(tmp_path / "run", *options)["resampler"]
    config = load_config(["tiny.yaml", *map(str, options)])
    torch.manual_seed(config.seed)
    from accelerate.utils import set_seed

    set_seed(config.seed)
    model, processor = load_start(config)
    samples, _ = open_data(config.data, stage="resampler", seed=0)
    stream = BatchStream(samples, ConversationCollator(processor), batch_size=7, max_steps=1)
    (batch,) = next(iter(stream)).micro_batches
    logits = model.eval()(**{**batch, "labels": None}, stage="resampler").logits.double()
    overlap = model.overlap_loss(model.model.encode_views(batch["pixel_values"]))[0]
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected = plain + model.config.overlap_loss_weight_finetune * overlap
    assert losses[0] == pytest.approx(float(expected), abs=1e-5)


# Nothing is lost


@pytest.fixture
def data_with_bad_rows(tmp_path, samples):
    """The samples, a broken image, a missing one and an empty answer among them."""
    folder = tmp_path / "data"
    folder.mkdir()
    for row in samples:
        shutil.copy(SAMPLES / row["file_name"], folder)
    (folder / "broken.jpg").write_bytes((SAMPLES / "park.jpg").read_bytes()[:5000])
    bad = [
        {"file_name": "broken.jpg", "query": "q", "annotation": "a"},
        {"file_name": "missing.jpg", "query": "q", "annotation": "a"},
        {"file_name": "park.jpg", "query": "sky", "annotation": ""},
    ]
    rows = samples[:20] + bad + samples[20:]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("kills", [2, 10])
def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(
    tmp_path, data_with_bad_rows, kills, record_property
):
    generator = random.Random(0)
    arguments = ["tiny.yaml", "--data", data_with_bad_rows, "--max_bad_share", 0.4, "--save_every", 2]
    arguments += ["--vision.epochs", 3, "--resampler.max_steps", 14, "--finetune.max_steps", 14]
    arguments += ["--eval_every", 5, "--validation_share", 0.1, "--num_workers", 1]
    command = [sys.executable, "-m", "panorama_vlm.train", *map(str, arguments), "--output"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, env=ENVIRONMENT)
    assert whole.returncode == 0, whole.stderr[-3000:]

    def lines(output):
        return sum(len(path.read_text().splitlines()) for path in output.glob("logs/*/metrics.jsonl"))

    killed, log, ways = tmp_path / "killed", tmp_path / "log", []
    for attempt in range(kills):
        begun = time.monotonic()
        with log.open("w") as words:
            process = subprocess.Popen([*command, str(killed)], stdout=words, stderr=words, env=ENVIRONMENT)
        start = lines(killed) if attempt == 0 else None
        how = signal.SIGTERM if attempt in (1, 7) else signal.SIGKILL
        wanted = generator.randint(1, 4)
        while process.poll() is None and time.monotonic() - begun < 120:
            if start is None and time.monotonic() - begun > 3:
                start = lines(killed)  # after the lines of steps that are made again were dropped
            if start is not None and lines(killed) >= start + wanted:
                time.sleep(generator.random() * 0.1)
                break
            time.sleep(0.01)
        process.send_signal(how)
        ways.append(process.wait(60))
        assert ways[-1] in (-signal.SIGKILL, PREEMPTED), log.read_text()[-3000:]
        record_property("tried", len(ways))
    assert ways.count(PREEMPTED) == (1 if kills < 8 else 2) == kills - ways.count(-signal.SIGKILL)
    last = subprocess.run([*command, str(killed)], capture_output=True, text=True, env=ENVIRONMENT)
    assert last.returncode == 0, last.stderr[-3000:]

    for stage in ("vision", "resampler", "finetune"):
        assert same_weights(tmp_path / "whole" / stage, killed / stage), stage
        assert metrics(tmp_path / "whole", stage) == metrics(killed, stage)
        skipped = [
            [json.loads(line) for line in (output / "logs" / stage / "skipped.jsonl").read_text().splitlines()]
            for output in (tmp_path / "whole", killed)
        ]
        assert skipped[0] == skipped[1]
    reasons = {record["reason"].split(":")[0] for record in skipped[0]}
    assert {"unreadable image", "missing image", "empty answer"} >= reasons and reasons
    file = "finetune/adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (killed / file).read_bytes()


def test_a_torn_checkpoint_is_ignored_with_a_word_and_the_one_before_it_found(tmp_path, caplog):
    from panorama_vlm.train.checkpoint import write_state

    for step in (2, 4, 6):
        with whole_folder(tmp_path / f"vision-{step}") as folder:
            (folder / "model.safetensors").write_bytes(bytes(100))
            write_state(folder, {"stage": "vision", "step": step, "total_steps": step})
    assert newest_checkpoint(tmp_path).name == "vision-6"
    (tmp_path / "vision-6/model.safetensors").write_bytes(bytes(60))
    assert newest_checkpoint(tmp_path).name == "vision-4"
    assert "vision-6" in caplog.text and "model.safetensors has 60 bytes instead of 100" in caplog.text
    (tmp_path / "vision-4/trainer_state.json").unlink()
    assert newest_checkpoint(tmp_path).name == "vision-2"
    with pytest.raises(RuntimeError, match="killed"), whole_folder(tmp_path / "vision-8") as folder:
        (folder / "model.safetensors").write_bytes(bytes(10))
        raise RuntimeError("killed while writing")
    caplog.clear()
    assert newest_checkpoint(tmp_path).name == "vision-2"
    assert "was not finished when the run was stopped" in caplog.text
    with pytest.raises(ValueError, match="is not whole"):
        read_state(tmp_path / "vision-6")


def test_a_folder_that_is_written_again_is_replaced_whole(tmp_path):
    for content in ("first", "second"):
        with whole_folder(tmp_path / "a") as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "second"]


def test_too_many_bad_samples_end_the_run_and_say_why(tmp_path):
    rows = [{"file_name": "park.jpg" if i % 2 else "none.jpg", "query": "q", "annotation": "a"} for i in range(40)]
    shutil.copy(SAMPLES / "park.jpg", tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--stage", "resampler", "--data", tmp_path, "--resampler.max_steps", 10]
    with pytest.raises(TooManyBadSamples, match="could not be used, more than the allowed share of 0.1.*missing image"):
        run_here(tmp_path / "run", *options)
    with pytest.raises(ValueError, match="the folder has no metadata.jsonl"):
        run_here(tmp_path / "other", "--stage", "resampler", "--data", SAMPLES.parent / "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", r"in .*odd\.yaml: .*line 2"),
        ("model: \x84", r"in .*odd\.yaml: unacceptable character"),
        ("vision: !!python/object:os.system {}", r"in .*odd\.yaml: could not determine a constructor"),
        ("resampler: {learning_rates: {projection: {a: 1}}}", "resampler.learning_rates.projection must be a number"),
        ("resampler: {learning_rate: .inf}", "resampler.learning_rate must be finite, got inf"),
    ],
)
def test_a_file_that_is_no_yaml_is_named_with_the_place(tmp_path, text, message):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config([str(tmp_path / "odd.yaml"), "--model", "m", "--data", "d"])


@pytest.mark.slow
def test_a_run_that_fails_ends_although_its_workers_ignore_sigterm(tmp_path):
    code = """
from panorama_vlm.train import __main__, loop

def fail(*_):
    raise RuntimeError("out of memory")

loop._StageRun._log = fail
__main__.main()
"""
    arguments = ["tiny.yaml", "--stage", "resampler", "--num_workers", "1", "--output", str(tmp_path / "run")]
    command = [sys.executable, "-c", code, *arguments]
    failed = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert failed.returncode == 1 and "RuntimeError: out of memory" in failed.stderr


@pytest.mark.slow
def test_the_whole_language_model_and_tower_train_where_lora_is_off(tmp_path):
    options = "{latent_dimension: 32, vicreg_projector_dim: 48, use_lora: false, finetune_vision_tower: true}"
    losses = run_here(
        tmp_path, "--stage", "finetune", "--options", options, "--finetune.max_steps", 12, "--gradient_checkpointing"
    )
    assert losses["finetune"][-1] < losses["finetune"][0]
    assert not (tmp_path / "finetune/adapter").exists()
    rates = json.loads((tmp_path / "logs/finetune/metrics.jsonl").read_text().splitlines()[0])
    assert {"learning_rate/vision_tower", "learning_rate/language_model"} <= set(rates)


@pytest.mark.slow
def test_a_model_of_random_weights_trains_whole_where_it_is_asked_and_else_what_stays_frozen_is_named(tmp_path, caplog):
    run_here(tmp_path / "frozen", "--stage", "resampler", "--resampler.max_steps", 1)
    assert "language model has random weights and stays frozen in stage 'resampler'" in caplog.text
    run_here(tmp_path / "vision", "--stage", "vision", "--vision.epochs", 0.1)
    assert "vision tower has random weights and stays frozen in stage 'vision'" in caplog.text
    caplog.clear()
    options = ["--options.vision_trainable_blocks", "all", "--options.resampler_vision_tower", "true"]
    options += ["--options.resampler_language_model", "true", "--finetune.max_steps", 1]
    options += ["--vision.optimizer", "muon", "--resampler.optimizer", "muon"]
    run_here(tmp_path / "whole", *options)
    assert "random weights" not in caplog.text
    vision, resampler = (
        load_file(tmp_path / "whole" / stage / "model.safetensors") for stage in ("vision", "resampler")
    )
    changed = {part_of(name) for name, value in resampler.items() if not torch.equal(value, vision[name])}
    assert changed == {"vision_tower", "resampler", "projection", "language_model"}


@pytest.mark.slow
def test_prepared_views_and_a_stage_of_its_own_rates_train_too(tmp_path):
    options = ["--cache_dir", tmp_path / "views", "--num_workers", 2, "--vision.learning_rates", "{resampler: 0.0}"]
    losses = run_here(tmp_path / "run", "--stage", "vision", *options)
    assert len(losses["vision"]) == 8
    assert list((tmp_path / "views").rglob("*.safetensors"))
    line = json.loads((tmp_path / "run/logs/vision/metrics.jsonl").read_text().splitlines()[-1])
    assert line["learning_rate/resampler"] == 0 and line["grad_norm"] > 0


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.yaml"], "there is no file 'nope.yaml'; ready ones are .*tiny.yaml"),
        (["tiny.yaml", "--finetune.epoch", "3"], "finetune.epoch: .*Did you mean: 'epochs'"),
        (["tiny.yaml", "--vision.epochs", "many"], "vision.epochs: Value 'many'"),
        (["tiny.yaml", "--stage", "fine"], "Invalid value 'fine', expected one of"),
        (["tiny.yaml", "--vision.batch_size", "0"], "vision.batch_size must be positive, got 0"),
        (["tiny.yaml", "--vision.warmup_ratio", "1"], r"vision.warmup_ratio must be in \[0, 1\), got 1"),
        (
            ["tiny.yaml", "--vision.schedule", "cosin"],
            "vision.schedule must be one of linear, .*stable_decay, got cosin$",
        ),
        (["tiny.yaml", "--vision.schedule", "reduce_on_plateau"], "vision.schedule must be one of linear"),
        (["tiny.yaml", "--vision.decay_ratio", "0.2"], "must be warmup_stable_decay with decay_ratio, got cosine"),
        (["tiny.yaml", *STABLE, "--vision.decay_ratio", "0"], r"vision.decay_ratio must be in \(0, 1\], got 0"),
        (["tiny.yaml", *STABLE, "--vision.decay_ratio", "1.1"], r"vision.decay_ratio must be in \(0, 1\], got 1.1"),
        (["tiny.yaml", *STABLE, "--vision.warmup_ratio", "0.8"], r"vision.decay_ratio must be at most 1, got 1.1"),
        (["tiny.yaml", "--vision.optimizer", "sgd"], r"Invalid value 'sgd', expected one of \['adamw', 'muon'\]"),
        (["tiny.yaml", "--finetune.learning_rates", "{head: 1}"], "must be one of vision_tower, .*got head"),
        (["tiny.yaml", "--model", "m"], "leave it out with --model"),
        (["--data", "x"], "give --model, compose.vlm, or both compose.vision and compose.language"),
        (["tiny.yaml", "--data", "[]"], "stage 'vision' has no data"),
        (["tiny.yaml", "vision"], "expected --option value, got 'vision'"),
        (["tiny.yaml", "--data", "no_such_package:x"], "'no_such_package', which is not installed"),
    ],
)
def test_wrong_options_are_found_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_config(arguments)


def test_options_of_the_command_line_win_over_the_file_and_the_resolved_ones_are_a_file_again(tmp_path):
    config = load_config(["tiny.yaml", "--finetune.epochs=7", "--push-to-hub", "org/name", "--hub-private"])
    assert config.finetune.epochs == 7 and config.finetune.accumulation == 2
    assert config.push_to_hub == "org/name" and config.hub_private
    save_config(config, tmp_path / "config.yaml")
    assert load_config([str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_ready_files_are_right(file):
    config = load_config([file] if file != "quickstart.yaml" else [file, "--model", "start"])
    assert config.stages == ("vision", "resampler", "finetune")[-len(config.stages) :]
    assert len(config.stages) == 3 or config.compose.vlm is not None


def test_the_parts_of_the_default_model_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_parts(load_config(["default_model.yaml"]))


def test_the_command_line_says_in_one_line_what_is_wrong_and_explains_every_option():
    run = subprocess.run(
        [sys.executable, "-m", "panorama_vlm.train", "tiny.yaml", "--stages", "all"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: in the command line: stages: Key 'stages'")
    text = describe()
    for option in ("--output", "--vision.learning_rates", "--compose.tokenizer", "--push_to_hub", "--resume"):
        assert f"\n{option}\n" in text
