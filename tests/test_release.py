"""One command that releases: package and default model, to a Hub that listens here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from panorama_vlm import release
from panorama_vlm.evaluation.evaluate import EvaluationOptions, model_index
from panorama_vlm.tests.test_push import REPO, pushed, server  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"colour": {"accuracy": 0.9, "interval": [0.8, 1.0], "chance": 0.3, "count": 20, "panoramas": 6}}
METRICS = {
    "count": 20,
    "panoramas": 6,
    "headline": {"accuracy": 0.9, "interval": [0.8, 1.0], "chance": 0.3, "groups": 1, "count": 20},
    "groups": KINDS,
    "kinds": KINDS,
    "errors": [],
    "dropped": 0,
    "settings": {
        "data": "build/fresh",
        "split": "train",
        "decoding": "greedy",
        "headings": 1,
        "tilt": 0.0,
        "interval": "95 %, percentiles of a bootstrap over panoramas",
        "chance": "1 / options",
    },
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "model-index.yml").write_text(model_index(EvaluationOptions("model", "build/fresh"), METRICS))
    return folder


@pytest.fixture
def clone(tmp_path):
    """What lies here, committed."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", clone)
    name = ("-c", "user.name=Someone", "-c", "user.email=someone@example.org")
    for command in (("init", "--quiet"), ("add", "--all"), (*name, "commit", "--quiet", "--message", "All")):
        subprocess.run(["git", *command], cwd=clone, check=True)
    return clone


@pytest.fixture
def ready(clone, monkeypatch):
    """A clone that says that it is a release."""
    monkeypatch.setattr(release, "__version__", "2.0.0")
    changelog = clone / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("2.0.0 (unreleased)", "2.0.0 (1 December 2026)"))
    (clone / "__init__.py").write_text(re.sub('"2.0.0.dev0"', '"2.0.0"', (clone / "__init__.py").read_text()))
    name = ("-c", "user.name=Someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", *name, "commit", "--quiet", "--all", "--message", "2.0.0"], cwd=clone, check=True)
    return clone


def run(clone, results, output, *more):
    arguments = ["--root", str(clone), "--results", str(results), "--output", str(output), "--repo", REPO]
    release.main([*arguments, "--share-packages", *more])


@pytest.mark.tools
@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False])
def test_a_release_is_built_checked_tried_out_and_pushed(dry, ready, results, server, tmp_path, capsys, monkeypatch):  # noqa: F811
    for name in ("build", "twine"):
        pytest.importorskip(name)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    output = tmp_path / "release"
    if not dry:  # once is enough
        monkeypatch.setattr(release, "try_out", lambda *_: "yes")
    run(ready, results, output, "--source", "https://example.org/panorama", *["--dry-run"] * dry)
    said = capsys.readouterr().out
    assert "refused" not in said and f"asked {release.QUESTION!r}: " in said
    (wheel,), (sdist,) = (list((output / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
    assert "Version: 2.0.0\n" in metadata and "Project-URL: Issues, https://example.org/panorama/issues" in metadata
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if name.endswith(".safetensors")]
    card = ModelCard.load(output / "model" / "README.md")
    assert card.data.license == "apache-2.0" and f'"{REPO}"' in card.text
    (first, *_) = card.data.eval_results
    assert first.metric_value == 0.9 and "95 % interval 0.800 to 1.000, 20 questions" in first.metric_name
    for words in ("## Evaluation", "| colour | 90.0 % | 80.0 % – 100.0 % | 30.0 % | 20 |", "knows nothing of the real"):
        assert words in card.text
    assert "rendered scenes, seed 5" in card.text and "not been evaluated" not in card.text
    if dry:
        assert server.requests == [] and f"would be pushed to {REPO}" in said
    else:
        there = pushed(server)
        assert there["README.md"] == (output / "model" / "README.md").read_bytes()
        assert {"model.safetensors", "config.json", "pipeline_panorama.py"} <= set(there)
        assert "setup.cfg" not in there


def test_what_is_no_state_to_release_is_refused_before_anything_is_made(clone, results, tmp_path, capsys):
    (clone / "ask.py").write_text("")
    with pytest.raises(SystemExit) as stopped:
        run(clone, results, tmp_path / "release")
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "error: nothing was made" in said.err and not (tmp_path / "release").exists()
    assert "the tree is not clean: ask.py" in said.out and "2.0.0.dev0" in said.out
    assert "unreleased" in said.out and "no --source" in said.out


def test_no_clone_is_no_state_to_release(results, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, results, tmp_path / "release")
    assert "is no clone" in capsys.readouterr().err


def test_the_page_of_the_hub_does_what_it_says(make, server, results, tmp_path, monkeypatch, capsys):  # noqa: F811
    """`docs/hub.md`: a folder is pushed, gets its results, and is loaded."""
    page = (ROOT / "docs/hub.md").read_text()
    model, processor = make(use_lora=False)
    folder = tmp_path / "runs/first/finetune"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    shutil.copytree(results, "build/results")
    (command,) = re.findall(r"```\npython -m panorama_vlm\.evaluation\.card (.*?)\n```", page)
    from panorama_vlm.evaluation.card import main

    main(command.split())
    main(command.split())  # again: nothing is there twice
    head = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert len(head["model-index"][0]["results"][0]["metrics"]) == 2 and head["license"] == "apache-2.0"
    text = (folder / "README.md").read_text()
    assert (
        text.count("## Evaluation") == 1
        and "org/name" in text
        and text.index("## Evaluation") < text.index("## Limits")
    )
    push, load = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(push.replace("org/name", REPO), {})
    assert "pushed" in capsys.readouterr().out
    assert pushed(server)["README.md"] == (folder / "README.md").read_bytes() and server.repos[REPO].private
    names: dict = {}
    exec(load.replace('"org/name"', f'"{folder}"'), names)
    assert type(names["model"]).__name__ == "PanoramaVLM"
