"""Weights in shards, on two CPU processes; and what the documentation has people start.

Accelerate shards over GPUs and their like only. Run as a script, this file trains, and tells it that its CPU processes
are some.
"""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from panorama_vlm.train.__main__ import main
from panorama_vlm.train.build import set_up_sharding
from panorama_vlm.train.config import CONFIGS
from safetensors.torch import load_file

PAGE = Path(__file__).resolve().parent.parent / "docs" / "multi_node.md"
FSDP = CONFIGS / "accelerate" / "fsdp2_2x8.yaml"
DEEPSPEED = CONFIGS / "accelerate" / "deepspeed_zero2.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
NO_DROPOUT = "{latent_dimension: 32, vicreg_projector_dim: 48, lora_dropout: 0.0, overlap_loss_weight_finetune: 0.1}"
OPTIONS = [
    "tiny.yaml",
    "--options",
    NO_DROPOUT,
    "--validation_share",
    "0.2",
    "--eval_every",
    "3",
    "--vision.epochs",
    "1",
]
OPTIONS += ["--resampler.max_steps", "2", "--finetune.max_steps", "8", "--save_every", "100"]
NO_GRADIENT = "vicreg_projector.layers.3.bias"  # VICReg is the same for any; what AdamW sees of it is rounding


def launcher(config, port, *arguments, machines=1, rank=0):
    """`accelerate launch` of two processes, on one machine or, one each, on two."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--num_processes", "2"]
    command += ["--main_process_port", str(port), "--num_machines", str(machines), "--machine_rank", str(rank)]
    if config is None:
        return [*command, "--cpu", "--dynamo_backend", "no", "-m", "panorama_vlm.train", *map(str, arguments)]
    return [*command, "--config_file", str(config), __file__, *map(str, arguments)]


def start(command, log):
    environment = {**ENVIRONMENT, "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def lines(output, stage, name="metrics"):
    file = output / "logs" / stage / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def assert_same_run(output, expected, stages):
    for stage in stages:
        for name in ("loss", "grad_norm", "eval_loss"):
            values, expected_values = (
                [line[name] for line in lines(run, stage) if name in line] for run in (output, expected)
            )
            assert expected_values and values == pytest.approx(expected_values, rel=1e-4, abs=1e-5), (stage, name)
        assert lines(output, stage, "samples") == lines(expected, stage, "samples")
        weights, wanted = (load_file(run / stage / "model.safetensors") for run in (output, expected))
        assert weights.keys() == wanted.keys()
        for name in weights.keys() - {NO_GRADIENT}:
            torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=1e-4, msg=f"{stage}: {name}")
        left_out = {"model.safetensors", "README.md", "loss_curve.png"}
        kinds = [{path.name for path in (run / stage).iterdir()} - left_out for run in (output, expected)]
        assert kinds[0] == kinds[1]


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    """The same run, its weights not in shards."""
    folder = tmp_path_factory.mktemp("data_parallel")
    log = folder / "log"
    command = launcher(None, 0, *OPTIONS, "--output", folder / "run")
    assert start(command, log).wait() == 0, log.read_text()[-3000:]
    return folder / "run"


@pytest.mark.slow
@pytest.mark.soak
def test_two_machines_with_fsdp_stopped_and_resumed_train_what_data_parallel_trains(data_parallel, tmp_path):
    output, logs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]

    def start_both():
        port = free_port()
        each = [launcher(FSDP, port, *OPTIONS, "--output", output, machines=2, rank=rank) for rank in (0, 1)]
        return [start(command, log) for command, log in zip(each, logs, strict=True)]

    machines = start_both()
    while not lines(output, "finetune"):
        assert all(machine.poll() is None for machine in machines), logs[0].read_text()[-3000:]
        time.sleep(0.05)
    machines[1].send_signal(signal.SIGTERM)  # one machine is taken away; both stop
    assert all(machine.wait() != 0 for machine in machines)
    assert all("Asked to stop" in log.read_text() for log in logs)
    (checkpoint,) = (output / "checkpoints").glob("finetune-*")
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() and not (output / "finetune").exists()

    command = launcher(None, 0, *OPTIONS, "--output", output)
    refused = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert refused.returncode != 0 and "shards was FSDP and is None" in refused.stderr

    machines = start_both()
    assert [machine.wait() for machine in machines] == [0, 0], logs[0].read_text()[-3000:]
    assert f"Going on from step {int(checkpoint.name[-7:])} of stage finetune" in logs[0].read_text()
    assert_same_run(output, data_parallel, ("vision", "resampler", "finetune"))


@pytest.mark.slow
@pytest.mark.soak
def test_muon_with_fsdp_trains_what_it_trains_data_parallel(tmp_path):
    options = [*OPTIONS, "--stage", "finetune", "--finetune.optimizer", "muon", "--options.use_lora", "false"]
    losses, weights = [], []
    for config in (None, FSDP):
        log, output = tmp_path / f"log-{len(losses)}", tmp_path / f"run-{len(losses)}"
        command = launcher(config, free_port(), *options, "--output", output)
        assert start(command, log).wait() == 0, log.read_text()[-3000:]
        losses.append([line["loss"] for line in lines(output, "finetune") if "loss" in line])
        weights.append(load_file(output / "finetune/model.safetensors"))
    assert losses[0][-1] < losses[0][0] and losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, weight in weights[0].items():  # of steps of 2e-3, rounded to bfloat16
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-3, msg=name)


@pytest.mark.slow
def test_deepspeed_trains_what_data_parallel_trains(data_parallel, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional: pip install deepspeed")
    log, output = tmp_path / "log", tmp_path / "run"
    assert start(launcher(DEEPSPEED, free_port(), *OPTIONS, "--output", output), log).wait() == 0, log.read_text()
    assert_same_run(output, data_parallel, ("vision", "resampler", "finetune"))


@pytest.mark.slow
def test_processes_that_do_not_see_each_other_do_not_train():
    command = launcher(FSDP, free_port(), "tiny.yaml", "--output", "nowhere")
    command[command.index(__file__) : command.index(__file__) + 1] = ["-m", "panorama_vlm.train"]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "2 processes were started, but no GPU was found" in run.stderr
    assert not Path("nowhere").exists()


# What the documentation has people start


def launched(config):
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "-m", "panorama_vlm.train"])
    return _validate_launch_command(arguments)[0]


def test_the_fsdp_file_is_one_that_accelerate_takes(monkeypatch):
    loaded = load_config_from_file(str(FSDP))
    assert loaded.distributed_type == DistributedType.FSDP
    assert (loaded.num_machines, loaded.num_processes) == (2, 16)
    environment = prepare_multi_gpu_env(launched(FSDP))
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for name in [name for name in environment if name.startswith("FSDP_")]:
        monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    known = set(vars(plugin)) | {"version"}
    assert {name.removeprefix("fsdp_") for name in yaml.safe_load(FSDP.read_text())["fsdp_config"]} <= {
        *known,
        "offload_params",
    }


def test_torchrun_is_told_what_the_fsdp_file_says():
    environment = prepare_multi_gpu_env(launched(FSDP))
    exports = dict(re.findall(r"((?:ACCELERATE|FSDP)_\w+)=(\w+)", PAGE.read_text()))
    assert {"ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_AUTO_WRAP_POLICY"} <= set(exports)
    assert exports == {name: environment[name] for name in exports}


def test_the_deepspeed_file_is_one_that_accelerate_takes(monkeypatch):
    assert load_config_from_file(str(DEEPSPEED)).distributed_type == DistributedType.DEEPSPEED
    arguments = launched(DEEPSPEED)
    arguments.deepspeed_fields_from_accelerate_config = ""
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    for name in [name for name in environment if name.startswith("ACCELERATE_")]:
        monkeypatch.setenv(name, environment[name])
    made = DeepSpeedPlugin().deepspeed_config
    assert made["zero_optimization"]["stage"] == 2 and made["gradient_accumulation_steps"] == 1


def plugin(**options):
    plain = {"fsdp_version": 2, "transformer_cls_names_to_wrap": None, "mixed_precision_policy": None}
    return SimpleNamespace(**{**plain, **options})


def test_the_blocks_of_tower_and_language_model_are_sharded_apart(make):
    model, _ = make()
    made = plugin()
    set_up_sharding(made, model)
    assert {"SiglipEncoderLayer", "Qwen3DecoderLayer"} <= set(made.transformer_cls_names_to_wrap)
    assert set(made.transformer_cls_names_to_wrap) <= {type(module).__name__ for module in model.modules()}


def test_losses_and_sums_of_gradients_are_not_rounded_to_bf16(make):
    made = FullyShardedDataParallelPlugin(fsdp_version=2)
    made.set_mixed_precision("bf16")
    set_up_sharding(made, make()[0])
    policy = made.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_fsdp_1_is_refused(make):
    with pytest.raises(ValueError, match="set fsdp_version to 2"):
        set_up_sharding(plugin(fsdp_version=1), make()[0])


@pytest.mark.parametrize(
    ("step", "asked", "requeued"),
    [("exit 0", False, False), ("exit 1", False, False), ("exit 75", False, True), ("wait", True, True)],
)
def test_the_slurm_script_requeues_what_was_stopped_and_nothing_else(tmp_path, step, asked, requeued):
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "job.sh").write_text(script)
    wait = f"echo $$ > {tmp_path}/step; trap 'exit 1' TERM; while true; do sleep 0.05; done"
    stand_ins = {
        "srun": wait if step == "wait" else step,
        "scancel": f'echo "$@" >> {tmp_path}/asked; kill -TERM $(cat {tmp_path}/step)',
        "scontrol": f'[ "$1" = show ] && echo first || echo "$@" >> {tmp_path}/requeued',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    slurm = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env={**os.environ, **slurm})
    if asked:
        while not (tmp_path / "step").exists() or not (tmp_path / "step").read_text().strip():
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
    job.wait(timeout=30)
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    if asked:
        assert (tmp_path / "asked").read_text() == "--signal=TERM 7\n"


if __name__ == "__main__":
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    main(sys.argv[1:])
