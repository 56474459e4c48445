"""A release in one command: the package built and checked, the default model pushed to the Hub with its card.

`make release REPO=org/name SOURCE=https://…` (or, after an evaluation of the model at the root, `python -m
panorama_vlm.release --repo … --source … --results …`) takes what is committed, and stops at the first thing that is not
as it should be. With `--dry-run` everything is made and checked, and nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from . import __version__
from .ask import answer, question
from .evaluation.card import add_results
from .modeling_panorama import PanoramaVLM
from .processing_panorama import PanoramaProcessor
from .stages_panorama import STAGES
from .train.card import write_model_card
from .train.config import load_config
from .train.hub import HubPusher

ROOT = Path(__file__).resolve().parent
QUESTION = "Can you see a dog?"
ORIGIN = (
    "Trained from random weights on rendered scenes alone, by `train/configs/default_model.yaml` of the project: a "
    "small model to try everything with, on any laptop."
)
LIMITS = [
    "It knows nothing of the real world: solids in eight colours and drawings of 84 things, in front of drawn or real "
    "surroundings. Of a photograph it takes everything for surroundings.",
    "Of long lists (captions of five things and more, counts) one thing in a list is often missing or wrong; asked at "
    "eight headings (`headings=8`) counts are right in 88 % instead of 80, captions in 79 instead of 69.",
    "Its options of views and tokens are those it learned by. Moved to others it has to learn: with all tokens it is "
    "right in 95.7 % instead of 98.3, as a cubemap in 94.2, with a global view in 96.3, as four tiles in 84.2, as one "
    "squeezed image in 61.7; after 1,200 panoramas more in 96.4, 95.6, 96.4, 87.7 and 93.1, as it is in 97.5.",
]


def problems(root: Path, source: str | None) -> list[str]:
    """Why this is no state to release, in sentences; empty where it is one."""
    found = []
    changed = _run(["git", "status", "--porcelain"], root).splitlines()
    if changed:
        found.append(f"the tree is not clean: {', '.join(line[3:] for line in changed[:5])}. Commit it, or put it away")
    if not re.fullmatch(r"\d+(\.\d+)*", __version__):
        found.append(f"__version__ is {__version__!r}: a release has numbers alone")
    heading = next(
        line for line in (root / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "
    )
    if __version__ not in heading or "unreleased" in heading:
        found.append(f"the first heading of CHANGELOG.md is {heading[3:]!r}, and should say {__version__} and its date")
    if source is None:
        found.append("no --source: the package would not say where its code lies and bugs are reported")
    return found


def build(root: Path, output: Path, source: str | None) -> Path:
    """Build wheel and source distribution of what is committed into `output/dist`, checked. Returns the wheel."""
    tree, dist = output / "tree", output / "dist"
    archive = output / "tree.tar"
    _run(["git", "archive", "--output", str(archive), "HEAD"], root)
    with tarfile.open(archive) as packed:
        packed.extractall(tree, filter="data")
    archive.unlink()
    if source:
        setup = tree / "setup.cfg"
        urls = {"Source": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}
        lines = "".join(f"    {name} = {source.rstrip('/')}{path}\n" for name, path in urls.items())
        setup.write_text(
            setup.read_text(encoding="utf-8").replace("[metadata]\n", f"[metadata]\nproject_urls =\n{lines}", 1)
        )
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(tree)], output)
    _run([sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(dist.iterdir()))], output)
    (wheel,) = dist.glob("*.whl")
    return wheel


def save_model(root: Path, output: Path, results: Path, repo_id: str) -> Path:
    """The default model as a folder that can be pushed, with its code and its card. Returns the folder."""
    folder = output / "model"
    model = PanoramaVLM.from_checkpoint(root, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    PanoramaProcessor.from_pretrained(root).save_pretrained(folder)
    config = load_config(["default_model.yaml"])
    stages = []
    for name in STAGES:
        options = getattr(config, name)
        seen = (options.max_steps or 0) * options.batch_size * options.accumulation
        seeds = [re.search(r"seed=(\d+)", data.path) for data in options.data]
        data = [{"path": f"rendered scenes, seed {seed[1]}", "samples": seen} for seed in seeds if seed]
        hyperparameters = {key: value for key, value in dataclasses.asdict(options).items() if key != "data"}
        stages.append({"name": name, "steps": options.max_steps, "hyperparameters": hyperparameters, "data": data})
    run = {"repo_id": repo_id, "license": "apache-2.0", "origin": ORIGIN, "limits": LIMITS, "stages": stages}
    write_model_card(folder, config=model.config, run=run)
    add_results(folder, results, repo_id=repo_id)
    return folder


def try_out(wheel: Path, model: Path, output: Path, constraints: Path, share: bool) -> str:
    """Install the wheel into a fresh environment and ask the model there. Returns the answer.

    Args:
        wheel: to install.
        model: folder of the model.
        output: the environment is made in here.
        constraints: versions for pip.
        share: take the packages of this environment, which is quick, and no others.

    Raises:
        ValueError: where the answer is another one than here.
    """
    place = output / "environment"
    venv.create(place, with_pip=True, clear=True)
    python = str(place / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if share:
        site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], output).strip())
        (site / "shared.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
        _run([*install, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], output)
    else:
        _run([*install, "--constraint", str(constraints), f"{wheel}[train]"], output)
    where = Path(_run([python, "-P", "-c", "import panorama_vlm; print(panorama_vlm.__file__)"], output).strip())
    if not where.is_relative_to(place):
        raise ValueError(f"the fresh environment imports {where}, which is not the wheel's")
    panorama = where.parent / "samples" / "park.jpg"
    said = _run([python, "-P", "-m", "panorama_vlm.ask", str(model), str(panorama), QUESTION], output).strip()
    loaded = PanoramaVLM.from_pretrained(model).eval()
    here = answer(loaded, PanoramaProcessor.from_pretrained(model), question(str(panorama), QUESTION))
    if said != here:
        raise ValueError(f"the installed wheel answers {said!r} where this clone answers {here!r}")
    return said


def release(
    root: Path, output: Path, results: Path, repo_id: str, *, source: str | None, dry_run: bool, share: bool
) -> None:
    """All of it, see the top of this file; `output` is made anew but for the results in it.

    Raises:
        ValueError: where something is not as it should be; it says what.
    """
    if not (root / ".git").exists():
        raise ValueError(f"{str(root)!r} is no clone: a release is made of what is committed")
    wrong = problems(root, source)
    for sentence in wrong:
        print(f"{'would be refused' if dry_run else 'refused'}: {sentence}")
    if wrong and not dry_run:
        raise ValueError("nothing was made")
    for made in ("tree", "dist", "model", "environment"):
        shutil.rmtree(output / made, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    pusher = HubPusher(repo_id)
    if not dry_run:
        pusher.check()
    wheel = build(root, output, source)
    print(f"built and checked: {', '.join(path.name for path in sorted(wheel.parent.iterdir()))}")
    model = save_model(root, output, results, repo_id)
    said = try_out(wheel, model, output, root / "constraints.txt", share)
    print(f"the wheel, in a fresh environment, asked {QUESTION!r}: {said}")
    message = f"PanoramaVLM {__version__}"
    if dry_run:
        files = sorted(path.relative_to(model) for path in model.rglob("*") if path.is_file())
        size = sum((model / path).stat().st_size for path in files)
        print(f"would be pushed to {repo_id} as {message!r}: {len(files)} files, {size / 2**20:.1f} MiB, from {model}")
    else:
        pusher.push(model, message)
        if commands := pusher.finish():
            raise ValueError(f"the model was not pushed; this does it: {commands[0]}")
        print(f"pushed to {repo_id}: {message!r}")
    print(f"The package goes to PyPI by: twine upload {wheel.parent}/*")


def _run(command: list[str], folder: Path) -> str:
    """What a command prints; `ValueError` with the end of its errors where it fails."""
    program = shutil.which(command[0])
    if program is None:
        raise ValueError(f"{command[0]} is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.release", description="Release package and model.")
    parser.add_argument("--repo", required=True, help="of the model on the Hub: org/name; not the project's own")
    parser.add_argument("--results", type=Path, required=True, help="output of an evaluation of the model at the root")
    parser.add_argument("--source", help="address of the project's repository, which the package names")
    parser.add_argument("--output", type=Path, default=Path("build/release"), help="folder (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the clone (default: of this file)")
    parser.add_argument("--dry-run", action="store_true", help="make and check everything, send nothing")
    parser.add_argument(
        "--share-packages", action="store_true", help="try the wheel with the packages of this environment (quick)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    try:
        release(
            options.root.resolve(),
            options.output.resolve(),
            options.results.resolve(),
            options.repo,
            source=options.source,
            dry_run=options.dry_run,
            share=options.share_packages,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
