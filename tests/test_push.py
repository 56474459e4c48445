"""Pushing to the Hub: the real client, over HTTP, against a small server that speaks the Hub's API and can fail."""

import base64
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from panorama_vlm.tests.hub_server import File, HubServer, Repo, sha256
from panorama_vlm.train.card import LOSS_CURVE, read_history, write_model_card
from panorama_vlm.train.hub import ANOTHER, HubPusher
from PIL import Image
from safetensors.torch import load_file

REPO = "org/panorama"
RUN = {
    "repo_id": REPO,
    "license": "apache-2.0",
    "stages": [
        {
            "name": "vision",
            "steps": 40,
            "samples": 160,
            "seconds": 75.0,
            "hyperparameters": {"learning_rate": 2e-4, "output": "/home/someone/vision"},
            "data": [{"path": "someone/quic-360", "samples": 12, "weight": 1.0}],
            "history": [{"step": step, "loss": 10 / step} for step in range(1, 41)],
            "results": {"retrieval": 0.25},
        }
    ],
    "samples": [{"image": "/data/park.jpg", "question": "sun?", "answer": "left | up", "reference": "left"}],
    "versions": {"torch": torch.__version__},
}
# Runs in a new process without the package, and knows nothing but the repo's name.
LOAD = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "panorama_vlm":
            raise ModuleNotFoundError("No module named 'panorama_vlm'", name="panorama_vlm")

sys.meta_path.insert(0, NoPackage())
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

repo, result = sys.argv[1:]
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
assert type(model).__module__.split(".")[0] == type(processor).__module__.split(".")[0] == "transformers_modules"
save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, result)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The Hub, reached by what is started as by a user's process: from the environment."""
    for name, value in {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": "hf_write",
        "NO_PROXY": "127.0.0.1,localhost",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """A folder such as a checkpoint, of files that the Hub stores in git and in LFS."""
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "empty.txt").write_text("")
    (folder / "model.safetensors").write_bytes(os.urandom(200_000))
    return folder


@pytest.fixture
def pusher(server):
    """`pusher(**options)` -> a HubPusher without long waits."""

    def make(**options):
        options = {"endpoint": server.endpoint, "attempts": 3, "wait_s": 0.05, "timeout_s": 5.0, **options}
        return HubPusher(REPO, **options)

    return make


def content(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pushed(server, revision="main"):
    files = server.files(REPO, revision)
    files.pop(".gitattributes", None)  # the Hub's own
    return files


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def run_command(command):
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_pushed_model_is_loaded_from_the_hub_in_a_new_process_with_the_same_weights(make, server, pusher, tmp_path):
    model, processor = make(use_lora=False)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    write_model_card(saved, config=model.config, run=RUN)
    push = pusher(private=True)
    push.check()
    push.push(saved, "Stage finetune")
    assert push.finish() == []
    assert pushed(server) == content(saved)
    assert server.repos[REPO].private
    complete = {"README.md", LOSS_CURVE, "config.json", "generation_config.json", "model.safetensors"}
    complete |= {"processor_config.json", "tokenizer.json", "modeling_panorama.py", "processing_panorama.py"}
    assert complete <= set(pushed(server))

    result = tmp_path / "loaded.safetensors"
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "PYTHONPATH": "", "TRANSFORMERS_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, str(script), REPO, str(result)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    loaded = load_file(result)
    assert loaded.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("private", [False, True])
def test_a_repo_is_created_as_asked_for_and_gets_one_commit_a_push(private, server, pusher, folder):
    push = pusher(private=private)
    push.push(folder, "one")
    assert push.finish() == []
    (folder / "config.json").write_text('{"changed": true}')
    push.push(folder, "two")
    assert push.finish() == []
    assert server.repos[REPO].private is private
    assert [commit.message for commit in server.repos[REPO].commits] == ["initial commit", "one", "two"]
    assert pushed(server) == content(folder)


@pytest.mark.parametrize("kind", [429, 500, 503, "cut", "lost", "slow"])
@pytest.mark.parametrize("match", ["/commit/", "PUT /lfs/"])
def test_a_fault_that_passes_ends_with_a_complete_repo_and_one_commit(kind, match, server, pusher, folder):
    server.fail(kind, times=1, match=match, seconds=2 if kind == "slow" else 0)
    push = pusher(timeout_s=1.0)
    push.push(folder, "a push")
    assert push.finish() == []
    assert pushed(server) == content(folder)
    assert [commit.message for commit in server.repos[REPO].commits] == ["initial commit", "a push"]


@pytest.mark.parametrize("kind", [401, 403, 429, 500, 503, "cut", "slow"])
def test_a_fault_that_stays_ends_with_a_command_that_pushes_once_it_has_passed(kind, server, pusher, folder, caplog):
    server.fail(kind, times=float("inf"), match="/commit/", seconds=20 if kind == "slow" else 0)
    push = pusher(attempts=2, timeout_s=1.0)
    before = content(folder)
    push.push(folder, "stage 'finetune', step 10", temporary=True)
    (command,) = push.finish()
    assert pushed(server) == {}, "half a push must not be seen"
    assert content(folder) == before
    assert str(folder) in caplog.text and command in caplog.text
    commits = sum("/commit/" in path for _, path, _ in server.requests)
    if kind in (401, 403):
        assert commits == 1, "a definite no is not asked again"
        assert "token" in caplog.text and f"fault {kind}" in caplog.text
    elif kind != "slow":  # the server still sleeps when the client has hung up
        assert commits == 2

    server.heal()
    run_command(command)
    assert pushed(server) == content(folder)
    assert server.repos[REPO].commits[-1].message == "stage 'finetune', step 10"
    assert "hf_write" not in command + caplog.text


@pytest.mark.parametrize("match", ["repos/create", "GET /api/models", "validate-yaml", "preupload", "batch", "verify"])
def test_a_fault_of_any_step_of_a_push_passes(match, server, pusher, folder):
    server.fail(503, match=match)
    push = pusher()
    push.push(folder, "a push")
    assert push.finish() == []
    assert server.faults[0].times == 0
    assert pushed(server) == content(folder)


def test_a_commit_that_is_carried_out_late_does_not_undo_a_newer_one(server, pusher, folder):
    """The first attempt is given up, but the Hub goes on with it after the second push is there."""
    server.fail("slow", match="/commit/", seconds=5.0)
    push = pusher(timeout_s=1.0)
    push.push(folder, "old")
    wait_until(lambda: any("verify" in path for _, path, _ in server.requests))
    (folder.parent / "newer").mkdir()
    (folder.parent / "newer" / "config.json").write_text('{"newer": 1}')
    push.push(folder.parent / "newer", "new")
    assert push.finish() == []
    wait_until(lambda: ("POST", f"/api/models/{REPO}/commit/main", 412) in server.requests)
    assert server.files(REPO)["config.json"] == b'{"newer": 1}'


def test_a_hub_that_is_not_there_ends_with_a_command_and_only_warns_before(pusher, folder, caplog):
    push = pusher(endpoint="http://127.0.0.1:9", attempts=2)
    push.check()
    assert "could not be asked" in caplog.text
    push.push(folder, "a push")
    (command,) = push.finish()
    assert "HF_ENDPOINT=http://127.0.0.1:9 hf upload org/panorama" in command


def test_offline_mode_is_a_warning_before_and_a_command_without_it_after(server, pusher, folder, caplog, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    push = pusher()
    push.check()
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids" in caplog.text
    push.push(folder, "a push")
    (command,) = push.finish()
    assert server.requests == []
    run_command(command)
    assert pushed(server) == content(folder)


def test_a_push_returns_at_once_and_the_newest_of_those_that_wait_is_pushed(server, pusher, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    server.fail("slow", match="/commit/", seconds=1.0)
    push = pusher()
    push.push(folder, "first")
    wait_until(lambda: any("preupload" in path for _, path, _ in server.requests))
    copies = []
    for name in ("second", "third", "fourth"):
        copies.append(tmp_path / name)
        copies[-1].mkdir()
        (copies[-1] / "config.json").write_text(json.dumps({"name": name}))
        start = time.monotonic()
        push.push(copies[-1], name, temporary=True)
        assert time.monotonic() - start < 0.1
    assert push.finish() == []
    assert [commit.message for commit in server.repos[REPO].commits] == ["initial commit", "first", "fourth"]
    assert pushed(server)["config.json"] == b'{"name": "fourth"}'
    assert not any(copy.exists() for copy in copies), "temporary copies are deleted"
    assert folder.exists(), "what is not temporary stays"
    assert "'third' is not pushed any more, 'fourth' takes its place" in caplog.text


def test_a_push_that_fails_gives_way_to_a_newer_one_and_is_kept_until_that_is_there(server, pusher, folder, tmp_path):
    server.fail(403, match="/commit/")
    push = pusher()
    push.push(folder, "first", temporary=True)
    assert len(push.finish()) == 1 and folder.exists()
    push.push(tmp_path / "nowhere", "lost", temporary=True)
    assert str(folder) in push.finish()[0] and folder.exists(), "it is still the newest there is"
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text('{"newer": 1}')
    push.push(newer, "second", temporary=True)
    assert push.finish() == []
    assert not folder.exists() and not newer.exists()


def test_a_retry_is_given_up_for_a_newer_folder(server, pusher, folder, tmp_path):
    server.fail(500, times=1, match="/commit/")
    push = pusher(wait_s=0.5)
    push.push(folder, "first")
    wait_until(lambda: (("POST", f"/api/models/{REPO}/commit/main", 500)) in server.requests)
    push.push(folder, "second")
    assert push.finish() == []
    assert [commit.message for commit in server.repos[REPO].commits] == ["initial commit", "second"]


def test_a_hanging_connection_does_not_hang_the_end_and_comes_back_no_later(server, pusher, folder):
    server.fail("slow", times=float("inf"), match="/commit/", seconds=4.0)
    push = pusher(timeout_s=60.0)
    push.push(folder, "a push")
    wait_until(lambda: any("verify" in path for _, path, _ in server.requests))
    start = time.monotonic()
    (command,) = push.finish(timeout_s=0.2)
    assert time.monotonic() - start < 1.5
    assert "hf upload" in command and folder.exists()
    assert push._thread is None and threading.active_count() < 20


def test_an_attempt_that_never_ends_is_stopped_after_its_time(server, pusher, folder, caplog):
    """The client asks again, for ever, when another repo of the same owner is being created."""
    server.fail(409, times=float("inf"), match="/repos/create")
    push = pusher(timeout_s=0.4, attempts=1)  # long enough for an answer on a busy machine
    push.push(folder, "a push")
    assert len(push.finish()) == 1
    assert "no result after 4 s" in caplog.text
    time.sleep(0.5)  # what was sent before the end may still be on its way
    asked = len(server.requests)
    time.sleep(0.5)
    assert len(server.requests) == asked, "it is really stopped"


def test_retry_after_is_honoured(server, pusher, folder):
    server.fail(429, match="/commit/", seconds=2)
    push = pusher()
    start = time.monotonic()
    push.push(folder, "a push")
    assert push.finish() == []
    assert time.monotonic() - start >= 2


def test_weights_of_an_earlier_push_that_would_be_loaded_instead_are_deleted(server, pusher, folder):
    push = pusher()
    push.push(folder, "one file")
    push.finish()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for index in (1, 2):
        (folder / f"model-0000{index}-of-00002.safetensors").write_bytes(weights[index:])
    (folder / "model.safetensors.index.json").write_text("{}")
    push.push(folder, "two files")
    assert push.finish() == []
    assert pushed(server) == content(folder)


def test_a_folder_that_is_gone_is_said_and_nothing_is_raised(server, pusher, tmp_path, caplog):
    push = pusher()
    push.push(tmp_path / "nowhere", "a push")
    assert len(push.finish()) == 1
    assert "nowhere is not there" in caplog.text


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
def test_what_is_under_way_when_the_interpreter_ends_is_said(ending, server, folder, tmp_path):
    server.fail("slow", times=float("inf"), match="/commit/", seconds=100.0)
    script = tmp_path / "run.py"
    script.write_text(
        "import logging, time\n"
        "from panorama_vlm.train.hub import HubPusher\n"
        "logging.basicConfig()\n"
        f"HubPusher({REPO!r}, endpoint={server.endpoint!r}).push({str(folder)!r}, 'a push', temporary=True)\n"
        "time.sleep(0.5)\n" + ending
    )
    command = [sys.executable, str(script)]  # it does not wait for the answer
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=90)
    assert run.returncode == (3 if ending else 0)
    assert f"hf upload {REPO} {folder} ." in run.stderr
    assert folder.exists()


def test_check_creates_the_repo_and_says_what_is_wrong_before_training(server, pusher, monkeypatch):
    pusher(private=True).check()
    assert server.repos[REPO].private
    for name in ("no-namespace", "a/b/c", "org/na me", "org/.."):
        with pytest.raises(ValueError, match=re.escape(name)):
            HubPusher(name, endpoint=server.endpoint).check()
    with pytest.raises(ValueError, match="may only read.*settings/tokens"):
        pusher(token="hf_read").check()
    with pytest.raises(ValueError, match="not valid.*hf auth login"):
        pusher(token="hf_nobody").check()
    server.fail(403, times=2, match="/repos/create|/api/models/")
    with pytest.raises(ValueError, match="may not write"):
        HubPusher("other/panorama", endpoint=server.endpoint).check()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no token.*hf auth login"):
        pusher().check()


def test_a_public_repo_is_refused_where_a_private_one_was_asked_for(server, pusher, folder):
    pusher().check()
    with pytest.raises(ValueError, match="is public.*--private"):
        pusher(private=True).check()
    push = pusher(private=True)
    push.push(folder, "secret")
    (command,) = push.finish()
    assert pushed(server) == {}
    assert f"hf upload {ANOTHER} {folder}" in command, "the command must not publish it either"


@pytest.mark.parametrize("source", ["setup.cfg", "train/hub.py"])
def test_a_repo_that_holds_source_is_refused_before_and_at_a_push_and_stays_as_it_is(source, server, pusher, folder):
    server.repos[REPO] = Repo(private=False)
    there = {"README.md": b"# The project", "modeling_panorama.py": b"", source: b""}
    server.repos[REPO].commit("the project", {path: File(data, lfs=False) for path, data in there.items()})
    with pytest.raises(ValueError, match=f"{source}.*README.md.*name another repo"):
        pusher().check()
    push = pusher()
    push.push(folder, "stage 'finetune'")
    (command,) = push.finish()
    assert pushed(server) == there
    assert f"hf upload {ANOTHER} {folder}" in command, "the command must not overwrite it either"


@pytest.mark.parametrize("kind", [429, 500, 503, "cut", "slow"])
def test_check_only_warns_where_the_hub_cannot_answer(kind, server, pusher, caplog):
    server.fail(kind, times=float("inf"), match="whoami", seconds=2)
    pusher(timeout_s=0.5).check()
    assert "could not be asked" in caplog.text


@pytest.mark.parametrize("option", ["attempts", "wait_s", "timeout_s"])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f"{option} must be .* -1"):
        HubPusher(REPO, **{option: -1})


def test_the_server_refuses_a_commit_without_its_lfs_object_as_a_whole(server, pusher):
    """The server itself: it must not be kinder than the Hub."""

    def asked(method, url, data, **headers):
        try:
            urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    pusher().check()
    header = {"key": "header", "value": {"summary": "broken", "description": ""}}
    regular = {"path": "a.txt", "content": base64.b64encode(b"a").decode(), "encoding": "base64"}
    missing = {"path": "model.safetensors", "algo": "sha256", "oid": sha256(b"never sent"), "size": 10}
    lines = [header, {"key": "file", "value": regular}, {"key": "lfsFile", "value": missing}]
    commit = "\n".join(map(json.dumps, lines)).encode()
    url = f"{server.endpoint}/api/models/{REPO}/commit/main"
    code, words = asked("POST", url, commit, Authorization="Bearer hf_write")
    assert code == 400 and "missing" in words
    code, _ = asked("PUT", f"{server.cdn}/lfs/{sha256(b'one thing')}?signature=test", b"another")
    assert code == 400
    assert pushed(server) == {} and server.objects == {}


# The model card


def test_the_card_says_what_is_known_and_only_that(make, tmp_path):
    model, _ = make(use_lora=False)
    model.config.vision_name, model.config.language_model_name = "google/siglip2", str(tmp_path)
    write_model_card(tmp_path, config=model.config, run=RUN)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == ["google/siglip2"] and card.data.datasets == ["someone/quic-360"]
    assert card.data.license == "apache-2.0" and {"panorama", "custom_code"} <= set(card.data.tags)
    last = [stage for stage in RUN["stages"] if stage.get("results")][-1]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name.removeprefix("eval_"): value for name, value in last["results"].items()} and found
    titles = re.findall("^## (.*)$", card.text, re.MULTILINE)
    everything = ["Use", "Views", "Training", "Data", "Loss", "Results", "Sample answers", "Limits", "Versions"]
    everything += ["Licence", "Citation"]
    assert titles == everything
    for words in (
        f'AutoModel.from_pretrained("{REPO}", trust_remote_code=True)',
        f"| tokens a panorama for the language model | {model.config.num_image_tokens} |",
        "| `learning_rate` | 0.0002 |",
        "| `retrieval` | 0.25 |",
        "| park.jpg | sun? | left \\| up | left |",
        f"![Loss of each stage over its steps]({LOSS_CURVE})",
    ):
        assert words in card.text
    assert "/home/someone" not in card.text and "/data/park" not in card.text and str(tmp_path) not in card.text

    (tmp_path / "bare").mkdir()
    write_model_card(tmp_path / "bare", config=model.config, run={})
    bare = ModelCard.load(tmp_path / "bare" / "README.md").text
    assert re.findall("^## (.*)$", bare, re.MULTILINE) == ["Use", "Views", "Limits", "Citation"]
    assert not (tmp_path / "bare" / LOSS_CURVE).exists()
    assert yaml.safe_load((tmp_path / "bare" / "README.md").read_text().split("---")[1])["tags"]


def test_the_code_of_the_card_runs(make, tmp_path, panoramas, monkeypatch, capsys):
    model, processor = make(use_lora=False)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    card = write_model_card(tmp_path / "saved", config=model.config, run={}).read_text()
    panoramas[0].save(tmp_path / "panorama.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3  # those of train/model_card.md
    for code in blocks:
        code = code.replace("path/to/this/folder", "saved").replace("max_new_tokens=64", "max_new_tokens=2")
        exec(
            code.replace(
                "trust_remote_code=True)\nprint(pipe", "trust_remote_code=True, max_new_tokens=2)\nprint(pipe"
            ),
            names,
        )
    assert type(names["model"]).__name__ == "PanoramaVLM"
    assert names["output"].text[0] in capsys.readouterr().out


def test_the_loss_curve_has_a_panel_a_stage_and_bears_short_and_broken_histories(make, tmp_path):
    model, _ = make(use_lora=False)
    history = [{"step": step, "loss": loss} for step, loss in enumerate([3.0, float("nan"), 2.0, None, 1.0])]
    sizes = {}
    for stages in (1, 2, 3):
        run = {"stages": [{"name": f"stage {i}", "history": history[: 5 - 2 * i]} for i in range(stages)]}
        write_model_card(tmp_path, config=model.config, run=run)
        sizes[stages] = Image.open(tmp_path / LOSS_CURVE).size
    assert sizes[2][0] == pytest.approx(2 * sizes[1][0], abs=2)
    assert sizes[3][0] == pytest.approx(3 * sizes[1][0], abs=2) and sizes[3][1] == sizes[1][1]


def test_without_matplotlib_the_card_has_no_picture_and_says_so(make, tmp_path, monkeypatch, caplog):
    model, _ = make(use_lora=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_model_card(tmp_path, config=model.config, run=RUN)
    assert "pip install matplotlib" in caplog.text
    assert LOSS_CURVE not in (tmp_path / "README.md").read_text() and not (tmp_path / LOSS_CURVE).exists()


def test_the_history_of_a_resumed_and_killed_run_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [("vision", 1, 3.0), ("vision", 2, 2.5), ("vision", 2, 2.0), ("resampler", 1, 5.0)]
    entries = [json.dumps({"stage": stage, "step": step, "loss": loss}) for stage, step, loss in lines]
    path.write_text("\n".join(entries) + '\n{"stage": "resam')
    history = read_history(path)
    assert [entry["loss"] for entry in history["vision"]] == [3.0, 2.0]
    assert [entry["step"] for entry in history["resampler"]] == [1]
    path.write_text("nonsense\n" + entries[0])
    with pytest.raises(ValueError, match="line 1 of .*metrics.jsonl.*nonsense"):
        read_history(path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["passing", "lasting"])
def test_a_run_ends_whole_whatever_the_hub_does(server, tmp_path, fault):
    """The trainer itself, from its command line: pushes at checkpoints and at the end."""
    if fault == "passing":
        for kind in (500, 429, "cut"):
            server.fail(kind, 1, match="/commit/")
    else:
        server.fail(403, 1000, match="/commit/")
    output = tmp_path / "run"
    command = [sys.executable, "-m", "panorama_vlm.train", "tiny.yaml", "--output", str(output), "--stage", "resampler"]
    command += ["--push-to-hub", REPO, "--hub-private", "--hub-every", "1", "--save_every", "2"]
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert not list(output.glob(".hub-*")) or fault == "lasting"
    assert (output / "resampler/model.safetensors").is_file() and list((output / "checkpoints").iterdir())
    if fault == "lasting":
        (command,) = re.findall(r"^hf upload .*$", run.stderr, re.MULTILINE)
        server.heal()
        subprocess.run(["bash", "-c", command], check=True, capture_output=True, env=environment)
    there = content(output / "resampler")
    del there["training.json"]  # what decided the stage names paths of this machine
    assert pushed(server) == there
    assert "loss_curve.png" in pushed(server)
    told = {"stdout": run.stdout.encode(), "stderr": run.stderr.encode(), **content(output), **pushed(server)}
    assert not [name for name, data in told.items() if b"hf_write" in data]  # the token
