"""Runs that tell the truth: what changed is said, what is wrong is found before the first step, nothing is lost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from panorama_vlm import PanoramaVLM
from panorama_vlm.data.collators import ConversationCollator
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.data.stream import BatchStream, Step
from panorama_vlm.tests.launching import ENVIRONMENT, SAMPLES, command, launch, metrics, run_here
from panorama_vlm.tests.test_reading import crop_values, photo_sphere
from panorama_vlm.train.checkpoint import newest_checkpoint
from panorama_vlm.train.config import CONFIGS, load_config
from panorama_vlm.train.loop import train
from PIL import Image

pytestmark = pytest.mark.slow


def stopped_at(output, step, monkeypatch, *options):
    """A run of stage `resampler` that was asked to stop at a step."""
    from panorama_vlm.train import steps
    from panorama_vlm.train.signals import Preempted

    real = steps.OptimizerStep.__call__

    def step_and_ask(self, made, log, stop):
        return real(self, made, log, made.index + 1 == step)

    with monkeypatch.context() as patch:
        patch.setattr(steps.OptimizerStep, "__call__", step_and_ask)
        with pytest.raises(Preempted):
            run_here(output, "--stage", "resampler", *options)


# 1 and 2: options that changed


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--resampler.learning_rate", "1e-5"), "resampler.learning_rate was 0.001 and is 1e-05"),
        (("--resampler.weight_decay", "0.5"), "resampler.weight_decay was 0.01 and is 0.5"),
        (("--compose.language.hidden_size", "96"), "compose.language.hidden_size was 48 and is 96"),
        (("--options.lora_rank", "8"), "options.lora_rank was 4 and is 8"),
        (("--options.fov_deg", "80"), "options.fov_deg was not given and is 80"),
        (("--resampler.learning_rates.projection", "1e-5"), "resampler.learning_rates.projection was not given and is"),
        (("--seed", "3"), "seed was 0 and is 3"),
    ],
)
def test_a_run_that_goes_on_with_other_options_is_refused_and_the_difference_named(
    tmp_path, monkeypatch, changed, named
):
    stopped_at(tmp_path, 3, monkeypatch)
    with pytest.raises(ValueError, match=named):
        run_here(tmp_path, "--stage", "resampler", *changed)


def test_an_option_that_is_no_longer_given_is_a_change_too(tmp_path, monkeypatch):
    stopped_at(tmp_path, 3, monkeypatch, "--options.fov_deg", "80")
    with pytest.raises(ValueError, match="options.fov_deg was 80 and is not given"):
        run_here(tmp_path, "--stage", "resampler")


def test_scenes_without_pictures_of_things_are_other_scenes(tmp_path, monkeypatch):
    data = ["--data", "synthetic://?scenes=12&seed=1&width=64", "--resampler.max_steps", 4]
    monkeypatch.setattr("panorama_vlm.synthetic.cutouts.find_font", lambda: "a font")
    monkeypatch.setattr("panorama_vlm.synthetic.write.available", lambda unknown=False: ())
    stopped_at(tmp_path, 1, monkeypatch, *data)
    monkeypatch.setattr("panorama_vlm.synthetic.cutouts.find_font", lambda: None)
    with pytest.raises(ValueError, match="cut-outs"):
        run_here(tmp_path, "--stage", "resampler", *data)


def test_another_precision_is_a_change(tmp_path, monkeypatch):
    stopped_at(tmp_path, 3, monkeypatch)
    state = next((tmp_path / "checkpoints").iterdir()) / "trainer_state.json"
    state.write_text(state.read_text().replace('"mixed precision": "no"', '"mixed precision": "bf16"'))
    with pytest.raises(ValueError, match="mixed precision was bf16 and is no"):
        run_here(tmp_path, "--stage", "resampler")


def test_a_checkpoint_of_a_stage_that_is_not_trained_is_refused(tmp_path, monkeypatch):
    stopped_at(tmp_path / "a", 3, monkeypatch)
    checkpoint = next((tmp_path / "a/checkpoints").iterdir())
    with pytest.raises(ValueError, match="is a checkpoint of 'resampler', and this run trains finetune"):
        run_here(tmp_path / "b", "--stage", "finetune", "--resume", checkpoint)


def test_options_that_the_weights_do_not_depend_on_may_change(tmp_path, monkeypatch):
    stopped_at(tmp_path, 3, monkeypatch)
    losses = run_here(tmp_path, "--stage", "resampler", "--save_every", 2, "--num_workers", 1, "--log_every", 3)
    assert len(losses["resampler"]) == 3


@pytest.mark.parametrize("changed", [("--resampler.max_steps", 9), ("--data", "other"), ("--resampler.epochs", 7)])
def test_a_finished_stage_of_another_run_is_not_taken_for_this_ones(tmp_path, changed):
    output = tmp_path / "run"
    run_here(output, "--stage", "resampler")
    assert run_here(output, "--stage", "resampler") == {}  # the same again: done
    if changed[1] == "other":
        shutil.copytree(SAMPLES, tmp_path / "other")
        changed = (changed[0], tmp_path / "other")
    with pytest.raises(ValueError, match="was trained otherwise: resampler"):
        run_here(output, "--stage", "resampler", *changed)


def test_a_folder_that_no_stage_has_left_is_refused(tmp_path):
    (tmp_path / "resampler").mkdir()
    with pytest.raises(ValueError, match="is no stage that this trainer has finished"):
        run_here(tmp_path, "--stage", "resampler")


def test_a_run_with_muon_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    options = ["--resampler.optimizer", "muon", "--resampler.learning_rates.projection", "3e-3"]
    options += ["--resampler.schedule", "warmup_stable_decay", "--resampler.decay_ratio", "0.7"]
    whole = run_here(tmp_path / "whole", "--stage", "resampler", *options)["resampler"]
    stopped_at(tmp_path / "stopped", 3, monkeypatch, *options)
    assert run_here(tmp_path / "stopped", "--stage", "resampler", *options)["resampler"] == whole[3:]
    files = [tmp_path / run / "resampler/model.safetensors" for run in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(set(whole)) > 1
    with pytest.raises(ValueError, match="resampler.optimizer was muon and is adamw"):
        run_here(tmp_path / "stopped", "--stage", "resampler", *options[2:])


def logged_last(output, stage):
    lines = (output / "logs" / stage / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line][-1]


SCENES = "synthetic://?scenes=40&seed=3&width=128&questions=3&tables=2&steps=true"


def test_labels_packed_questions_and_closer_looks_go_on_to_the_bit(tmp_path, monkeypatch):
    options = ["--data", SCENES, "--resampler.label_loss_weight", 0.5, "--resampler.independent_questions", 0.6]
    options += ["--resampler.further_view", 0.5, "--options.max_text_length", 8192]
    whole = run_here(tmp_path / "whole", "--stage", "resampler", *options)["resampler"]
    stopped_at(tmp_path / "stopped", 3, monkeypatch, *options)
    assert run_here(tmp_path / "stopped", "--stage", "resampler", *options)["resampler"] == whole[3:]
    for name in ("model.safetensors", "label_head.safetensors"):
        assert len({(tmp_path / run / "resampler" / name).read_bytes() for run in ("whole", "stopped")}) == 1
    assert logged_last(tmp_path / "whole", "resampler")["label_loss"] > 0
    assert PanoramaVLM.from_checkpoint(newest_checkpoint(tmp_path / "whole" / "checkpoints")).label_head is None
    changed = [*options[:3], 0.25, *options[4:]]
    with pytest.raises(ValueError, match="resampler.label_loss_weight was 0.5 and is 0.25"):
        run_here(tmp_path / "stopped", "--stage", "resampler", *changed)


@pytest.mark.parametrize("strategy", ["cubemap", "resize"])  # views that meet at their edges; a single one
def test_labels_alone_train_views_that_have_nothing_in_common_and_their_head_goes_on(tmp_path, recwarn, strategy):
    options = ["--data", SCENES, "--options.view_strategy", strategy, "--options.vicreg_loss_weight", 0.0]
    options += ["--options.overlap_loss_weight_finetune", 0.0, "--options.vision_trainable_blocks", "all"]
    options += [
        "--options.max_text_length",
        8192,
        "--vision.max_steps",
        4,
        "--vision.label_loss_weight",
        1.0,
        "--resampler.label_loss_weight",
        0.5,
    ]
    losses = run_here(tmp_path, "--stage", "vision", *options)["vision"]
    logged = logged_last(tmp_path, "vision")
    assert logged["loss"] == pytest.approx(logged["label_loss"]) and len(set(losses)) > 1
    assert {"accuracy_name", "accuracy_colour", "accuracy_size", "place_error"} <= set(logged)
    assert not [w for w in recwarn if "no effect" in str(w.message)]
    head = (tmp_path / "vision" / "label_head.safetensors").read_bytes()
    results = []
    for weight in (1.0, 0.25):  # of the same model: it does not move
        own = ["--vision.label_loss_weight", weight, "--vision.max_steps", 1, "--vision.learning_rate", 1e-12]
        own += ["--validation_share", 0.2, "--eval_samples", 0]
        run_here(tmp_path / f"{weight}", "--stage", "vision", *options, *own)
        stages = json.loads((tmp_path / f"{weight}" / "stages.json").read_text())
        results.append(stages["vision"]["results"]["eval_loss"])
    assert results[1] == pytest.approx(0.25 * results[0], rel=1e-4)
    run_here(tmp_path, "--stage", "resampler", *options)
    assert (tmp_path / "resampler" / "label_head.safetensors").read_bytes() != head
    with pytest.raises(ValueError, match="no source of the stage says what directions show"):
        run_here(tmp_path / "other", "--stage", "vision", *options[2:])


# 11: stages one at a time


def test_stages_that_are_trained_one_at_a_time_chain(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(whole)
    for stage in ("vision", "resampler", "finetune"):
        run_here(parts, "--stage", stage)
        assert metrics(parts, stage) == metrics(whole, stage)
        assert (parts / stage / "model.safetensors").read_bytes() == (whole / stage / "model.safetensors").read_bytes()


def test_a_stage_that_starts_from_one_composed_otherwise_is_refused(tmp_path):
    run_here(tmp_path, "--stage", "vision")
    with pytest.raises(ValueError, match="compose.language.hidden_size was 48 and is 96"):
        run_here(tmp_path, "--stage", "resampler", "--compose.language.hidden_size", 96)
    run_here(tmp_path, "--stage", "resampler", "--vision.learning_rate", 0.5)  # of a stage that is not this run's


def test_stages_that_start_from_a_model_chain_one_at_a_time_too(tmp_path):
    run_here(tmp_path / "made", "--stage", "vision")
    plain = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    del plain["compose"], plain["options"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))

    def run(output, *arguments):
        return train(load_config([str(tmp_path / "plain.yaml"), "--output", str(tmp_path / output), *arguments]))

    start = str(tmp_path / "made/vision")
    run("whole", "--model", start)
    for stage in ("vision", "resampler", "finetune"):
        run("parts", "--model", start, "--stage", stage)
        files = [tmp_path / output / stage / "model.safetensors" for output in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    shutil.copytree(start, tmp_path / "other")
    shutil.rmtree(tmp_path / "parts/finetune")
    with pytest.raises(ValueError, match="model was .*made/vision and is .*other"):
        run("parts", "--model", str(tmp_path / "other"), "--stage", "finetune")


# 3: Ctrl-C


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    asked = [sys.executable, "-m", "panorama_vlm.train", "tiny.yaml", "--stage", "resampler", "--num_workers", "1"]
    asked += ["--resampler.max_steps", "5000", "--output", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(asked, stdout=log, stderr=log, env=ENVIRONMENT)
    lines = tmp_path / "logs/resampler/metrics.jsonl"
    begun = time.monotonic()
    while not (lines.is_file() and len(lines.read_text().splitlines()) > 2) and time.monotonic() - begun < 120:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    status = process.wait(60)
    words = (tmp_path / "log").read_text()
    assert status == 75, words[-2000:]
    assert "Traceback" not in words and "start the same command again to go on" in words
    assert len(list((tmp_path / "checkpoints").iterdir())) >= 1


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher_alone_saves(tmp_path, processes):
    options = ["tiny.yaml", "--stage", "resampler", "--resampler.max_steps", "5000", "--output", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command(processes, *options), stdout=log, stderr=log, env=ENVIRONMENT)
    lines = tmp_path / "logs/resampler/metrics.jsonl"
    begun = time.monotonic()
    while not (lines.is_file() and len(lines.read_text().splitlines()) > 2) and time.monotonic() - begun < 120:
        time.sleep(0.1)
    started = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(60)
    _, left = psutil.wait_procs(started, timeout=60)
    words = (tmp_path / "log").read_text()
    assert not left and "Asked to stop: saved step" in words, words[-2000:]
    assert newest_checkpoint(tmp_path / "checkpoints") is not None


# 4 and 7: found before the first step, in a sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compose.language", "org/no-such-model"], "compose.language: 'org/no-such-model' is no folder here"),
        (["--compose.vision", "/no/such/tower"], "compose.vision: '/no/such/tower' is no folder here"),
        (["--compose.tokenizer", "no-tokenizer"], "compose.tokenizer: 'no-tokenizer' is no folder here"),
        (["--finetune.data", "/no/such/data"], "cannot read '/no/such/data'"),
        (["--options.overlap_ratio", "1.5"], "overlap_ratio must be in (0, 1), got 1.5"),
        (["--output", "FILE"], "cannot write to --output"),
    ],
)
def test_what_is_wrong_with_any_stage_is_said_in_a_sentence_before_the_first_step(tmp_path, options, words):
    (tmp_path / "file").write_text("in the way")
    options = [str(tmp_path / "file" / "run") if option == "FILE" else option for option in options]
    output = [] if "--output" in options else ["--output", str(tmp_path / "run")]
    command = [sys.executable, "-m", "panorama_vlm.train", "tiny.yaml", *output, *options]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 2
    assert words in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "run/logs").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_temporary_folder_that_data_workers_cannot_use_is_no_run_that_waits_forever(tmp_path, workers):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    environment = {**ENVIRONMENT, "TMPDIR": str(folder)}
    options = ["--num_workers", str(workers), "--stage", "vision", "--vision.max_steps", "1"]
    command = [sys.executable, "-m", "panorama_vlm.train", "tiny.yaml", "--output", str(tmp_path / "run"), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if workers:
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert "num_workers is 1" in run.stderr and "Set TMPDIR to a shorter path" in run.stderr
    else:
        assert run.returncode == 0, run.stderr[-2000:]


# 5: skipped data


def test_what_was_skipped_is_said_and_a_small_set_is_judged_too(tmp_path, caplog):
    rows = [{"file_name": name, "query": "q", "annotation": "a"} for name in ["park.jpg"] * 4 + ["none.jpg"] * 2]
    shutil.copy(SAMPLES / "park.jpg", tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--stage", "resampler", "--data", tmp_path, "--resampler.max_steps", 3, "--resampler.batch_size", 3]
    with pytest.raises(RuntimeError, match="2 of 6 samples could not be used"):
        run_here(tmp_path / "strict", *options)
    run_here(tmp_path / "run", *options, "--max_bad_share", 0.5)
    assert "A sample is left out, as others like it will be: missing image" in caplog.text
    said = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("Stage resampler: "))
    lines = (tmp_path / "run/logs/resampler/skipped.jsonl").read_text().splitlines()
    assert f"{len(lines)} of 9 samples could not be used: missing image ({len(lines)})" in said


# 6: the card


def test_the_card_shows_empty_answers_and_says_which_questions_were_trained(tmp_path):
    from panorama_vlm import PanoramaConfig
    from panorama_vlm.train.card import write_model_card

    sample = {"step": 3, "image": "park.jpg", "question": "sky", "answer": "", "reference": "Blue.", "trained": True}
    card = write_model_card(tmp_path, config=PanoramaConfig(), run={"samples": [sample]}).read_text()
    assert "| image | question | answer | reference |" in card
    assert "| park.jpg | sky |  | Blue. |" in card
    assert "Given by this model to questions that it was trained on. What is empty is what it gave." in card
    card = write_model_card(
        tmp_path, config=PanoramaConfig(), run={"samples": [{**sample, "trained": False}]}
    ).read_text()
    assert "Given by this model. What is empty" in card


# 9: streams


def test_a_stream_trains_and_is_validated(tmp_path):
    source = f"[{{path: '{SAMPLES}', streaming: true}}]"
    options = ["--stage", "resampler", "--data", source, "--resampler.max_steps", 4, "--validation_share", 0.3]
    losses = run_here(tmp_path, *options, "--eval_every", 2, "--eval_samples", 1)
    assert len(losses["resampler"]) == 4
    assert len(metrics(tmp_path, "resampler", "eval_loss")) >= 2
    assert metrics(tmp_path, "resampler", "epoch")


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.soak)])
def test_a_stream_goes_on_to_the_bit_with_as_many_processes_and_workers(tmp_path, processes, workers):
    source = f"[{{path: '{SAMPLES}', streaming: true}}]"
    options = ["tiny.yaml", "--stage", "resampler", "--data", source, "--resampler.max_steps", 7, "--save_every", 2]
    options += ["--keep_checkpoints", 10, "--eval_samples", 0, "--num_workers", workers, "--resampler.batch_size", 2]
    whole = launch(*options, "--output", tmp_path / "whole", processes=processes)
    assert whole.returncode == 0, whole.stderr[-3000:]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/resampler")
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"again/checkpoints/resampler-{step:07d}")
    other = launch(*options, "--output", tmp_path / "again", "--num_workers", workers + 1, processes=processes)
    assert other.returncode != 0 and f"num_workers (of a stream) was {workers} and is {workers + 1}" in other.stderr
    again = launch(*options, "--output", tmp_path / "again", processes=processes)
    assert again.returncode == 0 and "Going on from step 4" in again.stderr, again.stderr[-3000:]
    weights = [(tmp_path / each / "resampler/model.safetensors").read_bytes() for each in ("whole", "again")]
    assert weights[0] == weights[1]
    assert metrics(tmp_path / "whole", "resampler") == metrics(tmp_path / "again", "resampler")


# 10: one configuration


def test_options_beside_a_model_change_its_processor_too(tmp_path):
    from panorama_vlm.train.build import load_start

    run_here(tmp_path / "first", "--stage", "resampler")
    config = load_config(
        ["--model", str(tmp_path / "first/resampler"), "--options", "{fov_deg: 95, pitch_rows: [20]}"]
        + ["--data", str(SAMPLES)]
    )
    model, processor = load_start(config)
    assert model.config.view_plan == processor.image_processor.view_plan
    assert processor.image_processor.fov_deg == 95 and processor.num_image_tokens == model.config.num_image_tokens
    config.options = {"overlap_ratio": 1.5}
    with pytest.raises(ValueError, match="overlap_ratio must be in"):
        load_start(config)


# 12: DDP with a tower that trains


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    "tower", ["siglip_vision_model", pytest.param("clip_vision_model", marks=SOAK), pytest.param("dinov2", marks=SOAK)]
)
def test_two_processes_train_a_tower_of_which_a_part_has_no_gradient(tmp_path, tower):
    vision = f"{{model_type: {tower}, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    vision += "num_attention_heads: 2, image_size: 32, patch_size: 8}"
    run = launch(
        *["tiny.yaml", "--stage", "finetune", "--output", tmp_path, "--compose.vision", vision],
        *["--options.finetune_vision_tower", "true", "--finetune.max_steps", 3, "--eval_samples", 0],
        processes=2,
    )
    assert run.returncode == 0, run.stderr[-3000:]


# 13: joint statistics


@pytest.mark.parametrize(("stage", "batch"), [("vision", 5), pytest.param("resampler", 5, marks=pytest.mark.soak)])
def test_joint_statistics_are_those_of_one_process_though_the_last_step_leaves_one_with_nothing(tmp_path, stage, batch):
    """Eleven panoramas in steps of ten: of the second step one process has a panorama and the other none."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.loads(line) for line in (SAMPLES / "metadata.jsonl").read_text().splitlines()]
    rows = list({row["file_name"]: row for row in rows}.values())[:11]
    for row in rows:
        shutil.copy(SAMPLES / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = "{latent_dimension: 32, lora_dropout: 0.0, overlap_loss_weight_finetune: 0.1, vicreg_mode: batchwise, "
    options += "vicreg_use_ddp_gather: true}"
    common = ["tiny.yaml", "--stage", stage, "--options", options, "--data", folder, f"--{stage}.max_steps", 6]
    common += ["--save_every", 1000, "--eval_samples", 0]
    losses = []
    for processes, size in ((1, 2 * batch), (2, batch)):
        output = tmp_path / str(processes)
        run = launch(*common, "--output", output, f"--{stage}.batch_size", size, processes=processes)
        assert run.returncode == 0, run.stderr[-3000:]
        losses.append(torch.tensor(metrics(output, stage), dtype=torch.float64))
    assert losses[0].std() > 1e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=2e-5)


# 16: masks of views


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_partial_panoramas_have_the_losses_of_one_process_however_they_are_spread(tmp_path, stage):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number, path in enumerate(sorted(SAMPLES.glob("*.jpg"))[:8]):
        panorama = Image.open(path).convert("RGB").resize((256, 128))
        if number % 2:  # a third of the circle, as a phone takes it
            panorama = panorama.crop((96, 32, 96 + 16 * (4 + number), 128))
            values = crop_values((256, 128), panorama.size, top=32, left=96)
            panorama.save(folder / f"{number}.jpg", xmp=photo_sphere(**values))
        else:
            panorama.save(folder / f"{number}.jpg")
        rows.append({"file_name": f"{number}.jpg", "query": "What is this?", "annotation": f"Number {number}."})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = "{latent_dimension: 32, lora_dropout: 0.0, overlap_loss_weight_finetune: 0.1}"
    common = ["tiny.yaml", "--stage", stage, "--options", options, "--data", folder, f"--{stage}.max_steps", 6]
    common += ["--save_every", 1000, "--eval_samples", 0]
    losses = []
    for processes, size, accumulation in ((1, 4, 1), (2, 1, 2), (1, 1, 4)):
        output = tmp_path / f"{processes}-{size}"
        spread = [f"--{stage}.batch_size", size, f"--{stage}.accumulation", accumulation, "--output", output]
        run = launch(*common, *spread, processes=processes)
        assert run.returncode == 0, run.stderr[-3000:]
        losses.append(torch.tensor(metrics(output, stage), dtype=torch.float64))
    assert losses[0].std() > 1e-3
    for spread in losses[1:]:
        torch.testing.assert_close(spread, losses[0], rtol=0, atol=2e-5)


# 14: activations of frozen parts


def test_gradient_checkpointing_reaches_the_frozen_language_model(make, ask, panoramas):
    from panorama_vlm.train.build import checkpoint_activations

    model, processor = make()
    model.set_stage("resampler")
    inputs = ask(processor, panoramas[0])
    labels = inputs["input_ids"] % 500

    def step():
        """How often a layer of the language model runs in a step, and the gradient of the projection."""
        calls = []
        layer = model.model.language_model.layers[0].mlp
        handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
        model.zero_grad()
        model(**inputs, labels=labels, stage="resampler").loss.backward()
        handle.remove()
        return len(calls), model.model.projection.ray.weight.grad.clone()

    before = step()
    checkpoint_activations(model)
    after = step()
    assert (before[0], after[0]) == (1, 2)  # once more in backward
    torch.testing.assert_close(after[1], before[1])
    assert not model.model.language_model.layers[0].mlp.training


# 18: nothing about the disk


def test_what_is_pushed_says_nothing_about_the_disk(tmp_path):
    run_here(tmp_path / "secret-folder/run")
    for stage in ("vision", "resampler", "finetune"):
        for file in (tmp_path / "secret-folder/run" / stage).rglob("*"):
            if file.suffix in (".json", ".md", ".jinja") and file.name != "training.json":
                assert "secret-folder" not in file.read_text(), file


# 20: damage


def test_a_flipped_byte_is_found_and_the_checkpoint_before_it_used(tmp_path, monkeypatch, caplog):
    stopped_at(tmp_path, 5, monkeypatch)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name[-1] for folder in folders] == ["4", "5"]
    for name in ("model.safetensors", "optimizer.bin"):
        file = folders[-1] / name
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        file.write_bytes(damaged)
        caplog.clear()
        assert newest_checkpoint(tmp_path / "checkpoints") == folders[0]
        assert f"{name} is damaged" in caplog.text
        file.write_bytes(whole)
    assert newest_checkpoint(tmp_path / "checkpoints") == folders[-1]


# 15: a launch flag that would divide the gradients


def test_accumulation_of_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4 of accelerate launch"):
        run_here(tmp_path, "--stage", "resampler")


# 17: pinned memory


def test_a_step_can_be_pinned(monkeypatch, make):
    _, processor = make()
    samples, _ = open_data([DataSource(str(SAMPLES))], stage="resampler", seed=0)
    step = next(iter(BatchStream(samples, ConversationCollator(processor), batch_size=2, max_steps=1)))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor.shape) or tensor)
    again = step.pin_memory()
    assert isinstance(again, Step) and len(pinned) == len(step.micro_batches[0])


# 19: one writer


def test_a_file_that_is_torn_while_it_is_written_is_as_it_was(tmp_path, monkeypatch):
    from panorama_vlm.train import checkpoint

    file = tmp_path / "stages.json"
    checkpoint.write_whole(file, "[1]")
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        checkpoint.write_whole(file, "[1, 2, 3]")
    assert file.read_text() == "[1]"


def test_the_folder_of_a_stage_says_what_decided_it_and_the_hub_does_not(tmp_path):
    from panorama_vlm.train.push_process import _is_pushed

    train(load_config(["tiny.yaml", "--stage", "vision", "--output", str(tmp_path)]))
    decided = json.loads((Path(tmp_path) / "vision/training.json").read_text())
    assert decided["vision.learning_rate"] == 1e-3 and decided["compose.language.hidden_size"] == 48
    assert not _is_pushed("training.json") and _is_pushed("config.json")
