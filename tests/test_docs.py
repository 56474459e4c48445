"""What README and docs show: each block of Python runs, each parser takes its commands, each page is found."""

from __future__ import annotations

import argparse
import configparser
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from panorama_vlm.tests.test_vlm import folder, source  # noqa: F401 - fixtures
from panorama_vlm.train.config import load_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
WRAPPERS = {"changelog", "contributing", "readme", "searching", "security"}  # show a file of another folder, or name
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem not in WRAPPERS)
PAGES += [ROOT / "train/model_card.md"]

# Blocks of Python that run in tests of their own, which name the page.
ELSEWHERE = {
    "hub.md": "test_release.py",
    "model_card.md": "test_push.py",
    "places.md": "test_pipeline.py",
    "search.md": "test_search.py",
    "serve.md": "test_serving.py",
    "trainers.md": "test_trainers.py",
}
HUB = {  # names on the Hub -> the tiny random model that stands for each
    "HuggingFaceTB/SmolVLM-256M-Instruct": "a-smolvlm",
    "google/gemma-3-4b-it": "a-smolvlm",
    "google/siglip2-base-patch16-256": "tower",
    "facebook/convnext-tiny-224": "convnext",
    "Qwen/Qwen3-0.6B": "language",
}
NEEDS = {"quantization.md": "torchao", "video.md": "av"}
SETUP = {"SECURITY.md": "from transformers import AutoModel, AutoProcessor\nrepo = 'build/demo/model'\n"}
SETUP["backbones.md"] = "from panorama_vlm import PanoramaVLM\n"


def blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)


def dedented(code):
    indent = len(code) - len(code.lstrip(" "))
    return "".join(line[indent:] if line.strip() else "\n" for line in code.splitlines(keepends=True))


PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", [page for page in PYTHON if page.name in ELSEWHERE], ids=lambda page: page.name)
def test_a_page_that_runs_elsewhere_is_named_there(page):
    test = (ROOT / "tests" / ELSEWHERE[page.name]).read_text()
    assert page.name in test and re.search(r"\bexec\(", test)


@pytest.fixture
def place(tmp_path, monkeypatch, request):
    """A folder in which the files that the pages name lie: the model of the repository as that of `make demo`."""
    (tmp_path / "build/demo").mkdir(parents=True)
    (tmp_path / "build/train-demo").mkdir()
    for name in ("build/demo/model", "build/train-demo/finetune"):
        (tmp_path / name).symlink_to(ROOT)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "build/demo/park-2.jpg").symlink_to(ROOT / "samples/park.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_ins(place, names, tower, language, tokenizer, request):
    """The tiny models that stand for those of the Hub, as far as a page names them."""
    if "a-smolvlm" in names:
        request.getfixturevalue("folder")("smolvlm", "SmolVLMImageProcessor")
    if "tower" in names:
        AutoModel.from_config(AutoConfig.for_model(**tower)).save_pretrained(place / "tower")
    if "convnext" in names:
        sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_channels": 3}
        AutoModel.from_config(AutoConfig.for_model("convnext", **sizes)).save_pretrained(place / "convnext")
    if "language" in names:
        config = AutoConfig.for_model(**{**language, "vocab_size": len(tokenizer)})
        AutoModelForCausalLM.from_config(config).save_pretrained(place / "language")
        tokenizer.save_pretrained(place / "language")


def a_video(path):
    import av
    import numpy as np
    from PIL import Image

    panorama = Image.open(ROOT / "samples/park.jpg").resize((256, 128))
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 256, 128, "yuv420p"
        for turn in range(9):  # 4.5 seconds
            pixels = np.roll(np.asarray(panorama.convert("RGB")), 16 * turn, 1)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        video.mux(stream.encode())


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.tools] if page.name in NEEDS else [])
        for page in PYTHON
        if page.name not in ELSEWHERE
    ],
)
def test_the_python_of_a_page_runs(page, place, tower, language, tokenizer, request, monkeypatch, capsys):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    code = [dedented(block) for block in blocks(page, "python")]
    stand_ins(
        place, {HUB[name] for name in HUB if any(name in each for each in code)}, tower, language, tokenizer, request
    )
    if page.name == "video.md":
        a_video(place / "video.mp4")
    names: dict = {}
    exec(SETUP.get(page.name, ""), names)
    for block in code:
        for name, folder_of in HUB.items():
            block = block.replace(f'"{name}"', f'"{place / folder_of}"')
        block = block.replace('"cuda"', '"cpu"').replace("torch.bfloat16", "torch.float32").replace("4096", "256")
        exec(compile(block, str(page), "exec"), names)
    said = capsys.readouterr().out
    if page.name == "geometry.md":
        assert "768 of 2048 tokens are sent" in said and (place / "owners.jpg").is_file()
    if page.name == "evaluation.md":
        assert said.startswith("0.818")
    if page.name == "views.md":
        assert (
            said.startswith("4 1024") and names["processor"].num_image_tokens == names["model"].config.num_image_tokens
        )
    if page.name == "video.md":  # at 0, 2 and 4 seconds
        assert [path.stem for path in sorted(Path("frames").iterdir())] == ["00000.000", "00002.000", "00004.000"]
        assert len(names["frames"]) == 3 and said.count("frames/") == 3
    if page.name == "compose.md":
        assert (place / "start/model.safetensors").is_file() and (place / "start/processor_config.json").is_file()


# Commands

PROGRAMS = ("accelerate", "ffmpeg", "hf", "make", "pip", "python", "torchrun", "transformers", "vllm")
# Said to be refused, or a piece of one.
NO_COMMANDS = ("accelerate launch --cpu --use_fsdp", "accelerate launch -q", "accelerate merge-weights")


def commands_of(page):
    """Lines of blocks without a language, and code between single backticks, that begin with a program."""
    text = page.read_text()
    lines = []
    for language, block in re.findall(r"^ *```(\S*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        lines += block.replace("\\\n", " ").splitlines() if language in ("", "bash", "console") else []
    without_blocks = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks)]
    for line in lines:
        words = line.strip().removeprefix("$ ")
        program, _, rest = words.partition(" ")
        if (
            program in PROGRAMS
            and rest
            and words != "hf upload"
            and not words.startswith(NO_COMMANDS)
            and "…" not in words
        ):
            yield words


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands_of(page)})


class Parsed(Exception):  # noqa: N818 - no error
    """A parser took its arguments: what it was for need not be done."""


def takes(module, words, monkeypatch):
    """Whether the parser of a module takes the words; the trainer's is that of its configuration."""
    words = [re.sub(r"^[A-Z]$", "3", word) for word in words]  # --scenes N
    ready = {path.name for path in (ROOT / "train/configs").glob("*.yaml")}
    words = ["tiny.yaml" if word.endswith(".yaml") and word not in ready else word for word in words]
    if module == "panorama_vlm.train":
        data = [] if not words or words[0].endswith(".yaml") or "--data" in words else ["--data", "samples"]
        return load_config([*words, *data]) if words else None
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser, args=None, namespace=None):
        known, rest = parse(parser, args, namespace)
        if module == "panorama_vlm.plan":  # hands the rest to the trainer's
            start = [known.config] if known.config.endswith(".yaml") else ["--model", known.config, "--data", "samples"]
            load_config([*start, *rest])
        else:
            assert not rest, rest
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    is_package = importlib.util.find_spec(module).submodule_search_locations is not None
    with pytest.raises(Parsed):
        importlib.import_module(f"{module}.__main__" if is_package else module).main()


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}"[:90] for page, command in COMMANDS])
def test_a_command_is_one_that_its_parser_takes(page, command, monkeypatch, place):
    words = shlex.split(re.sub(r"(?<!\S)\[|\](?!\S)", "", command), comments=True)  # [--option]
    if words[0] == "make":
        for target in words[1:]:
            assert "=" in target or re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        for name in re.findall(r"(?:panorama-vlm|\.)\[([\w,]+)\]", command):
            assert set(name.split(",")) <= set(config["options.extras_require"])
    elif words[0] == "hf":
        verb = words[1:3] if words[1] == "auth" else words[1:2]
        help_of = [sys.executable, "-m", "huggingface_hub.cli.hf", *verb, "--help"]
        run = subprocess.run(help_of, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert all(word in run.stdout for word in words if word.startswith("--"))
    elif "-m" in words and words[words.index("-m") + 1].startswith("panorama_vlm"):
        at = words.index("-m")
        module, rest = words[at + 1], words[at + 2 :]
        if module == "panorama_vlm.demo":
            pytest.importorskip("gradio")
        if words[0] == "accelerate":
            assert words[1] == "launch"
            launch_command_parser().parse_args([*words[2:at], "-m", module])
        takes(module, rest, monkeypatch)
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})


# The whole


def test_every_page_is_in_the_index_once():
    listed = re.findall(r"^([\w-]+)$", "\n".join(blocks(ROOT / "docs/index.md", "{toctree}")), re.MULTILINE)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index", "search"}
    assert sorted(listed) == sorted(pages)


def test_links_to_files_of_the_repository_are_there():
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
            if not link.startswith(("http", "{")):
                assert (page.parent / link).exists(), (page.name, link)


def test_the_citation_is_the_same_everywhere():
    import panorama_vlm

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    bibtex = re.search(r"```bibtex\n(.*?)```", (ROOT / "docs/cite.md").read_text(), re.DOTALL)[1]
    assert cited["version"] == panorama_vlm.__version__ and f"version = {{{cited['version']}}}" in bibtex
    assert f"{{{cited['title']}}}" in bibtex and cited["authors"][0]["name"] in bibtex


@pytest.mark.tools
def test_the_citation_is_valid():
    cffconvert = pytest.importorskip("cffconvert")
    cffconvert.Citation((ROOT / "CITATION.cff").read_text()).validate()


@pytest.mark.tools
@pytest.mark.slow
@pytest.mark.parametrize("broken", [None, "views.md#no-such-heading", "no_page.md", "../train/no_file.yaml"])
def test_the_site_builds_and_a_broken_link_ends_it(broken, tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    command = [sys.executable, "-P", "-m", "sphinx", "-W", "-q", str(ROOT / "docs"), str(tmp_path / "site")]
    if broken:  # one page is enough
        copy = tmp_path / "docs"
        copy.mkdir()
        (tmp_path / "docs/conf.py").write_text((ROOT / "docs/conf.py").read_text())
        (copy / "views.md").write_text("# Views\n\n## The table\n")
        (copy / "index.md").write_text(
            f"# Index\n\n[a link]({broken}) [another](views.md#the-table)\n\n```{{toctree}}\nviews\n```\n"
        )
        command[-2] = str(copy)
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode == 0) == (broken is None), run.stderr[-3000:]
    assert broken is None or broken.removeprefix("../").removesuffix(".md").split("#")[-1] in run.stderr


@pytest.mark.tools
@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "dist"):
            (tmp_path / path.name).symlink_to(path)
    notebook = nbformat.read(ROOT / "docs/own_panorama.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]  # none are committed
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == 5
    shown = [str(cell.outputs) for cell in cells]
    assert "image/png" in shown[2] and "image/png" in shown[4] and "NamedPlace" in shown[4]
    answer = cells[3].outputs[-1]["data"]["text/plain"]
    assert len(answer) > 2, answer
