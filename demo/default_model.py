"""Ask the default model about scenes that it was never trained on, in seconds.

`make demo` (`python -m panorama_vlm.demo.default_model --output build/demo`) asks the model at the root of the
repository (`--model` names another folder) a few questions of every kind: about rendered scenes, and about two real
panoramas that training never had, with things put into them. It leaves the panoramas with their questions
(`metadata.jsonl`), `answers.json`, `views.png` (the places of the answers: expected in green, answered in red) and the
model, in `model/`; then it asks one of the questions in a process without this package, and ends with an error where
the answer is another one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers.utils import logging

from ..evaluation.answers import places_of
from ..evaluation.asking import Answerer, Asked
from ..evaluation.formats import read_items
from ..evaluation.items import Item
from ..evaluation.prompts import ask_text
from ..evaluation.run import judged_line
from ..evaluation.scores import right_answer
from ..modeling_panorama import PanoramaVLM
from ..places_panorama import draw_bfov
from ..processing_panorama import PanoramaProcessor
from ..synthetic.questions import KINDS, Question
from ..synthetic.scenes import Scene
from ..synthetic.write import METADATA, SAMPLES, World, row_of, warn_without_cutouts

ROOT = Path(__file__).resolve().parent.parent
SEED = 2026  # no configuration trains on it
UNSEEN = ("lab", "park")  # samples that are around no scene of default_model.yaml
EXPECTED, ANSWERED = "lime", "red"
_LONGEST = 192  # new tokens: the steps and places of a long list
_BATCH = 16


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.demo.default_model", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for everything it makes")
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of the model (default: the repository)")
    parser.add_argument("--questions", type=int, default=3, help="of each kind (default: 3)")
    options = parser.parse_args(arguments)
    if options.questions < 1:
        parser.error(f"--questions must be at least 1, got {options.questions}")
    missing = [name for name in ("config.json", "model.safetensors") if not (options.model / name).is_file()]
    if missing:
        parser.error(
            f"there is no model in {str(options.model)!r} ({' and '.join(missing)} missing): a clone of the repository "
            "has one, an installed package has none. Run this in a clone, or name a folder by --model"
        )
    output: Path = options.output
    if output.resolve() in (options.model.resolve(), *options.model.resolve().parents):
        parser.error(f"--output {str(output)!r} would be deleted with the model in it: choose another folder")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    logging.disable_progress_bar()
    warn_without_cutouts()

    write_questions(output, options.questions)
    model = PanoramaVLM.from_checkpoint(options.model, dtype=torch.float32).eval()
    processor = PanoramaProcessor.from_pretrained(options.model)
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    items = read_items(output).items
    answers = ask(model, processor, items)
    (output / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(output, items, answers)
    show(answers)
    print(f"Model: {output / 'model'}  answers: {output / 'answers.json'}  their places: {output / 'views.png'}")
    if all("error" in answer for answer in answers):
        sys.exit(f"error: nothing could be asked: {answers[0]['error']}")
    ask_without_the_package(output, answers[0])


def write_questions(folder: Path, each: int) -> None:
    """Panoramas and `metadata.jsonl`, with `each` questions of every kind; the first are those of `UNSEEN`."""
    with (folder / METADATA).open("w", encoding="utf-8") as rows:
        for number, (world, scene, questions) in enumerate(tqdm(_scenes(each), "scenes", unit=""), 1):
            name = f"{Path(scene.panorama).stem if scene.panorama else 'rendered'}-{number}.jpg"
            world.picture(scene).save(folder / name, quality=92, subsampling=0)
            rows.write(json.dumps(row_of(scene, questions, name)) + "\n")


def _scenes(each: int) -> Iterator[tuple[World, Scene, list[Question]]]:
    """Scenes with their questions, at most one of a kind in a scene, until there are enough of every kind."""
    missing, numbers = Counter(dict.fromkeys(KINDS, each)), itertools.count()
    for around in itertools.chain(UNSEEN, itertools.repeat(None)):
        wanted = tuple(kind for kind in KINDS if missing[kind]) or tuple(KINDS)
        world = World(SEED, questions=2 * len(wanted), kinds=wanted, backgrounds=f"{SAMPLES}:{','.join(UNSEEN)}")
        scene = world.scene(next(numbers))
        while around and scene.panorama != f"{around}.jpg":
            scene = world.scene(next(numbers))
        questions = {question.kind: question for question in world.ask(scene)}
        missing -= Counter(questions.keys())
        yield world, scene, list(questions.values())
        if not missing and around is None:
            return


def ask(model: PanoramaVLM, processor: PanoramaProcessor, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The judged answer to each question, in their order; the first is asked by itself, as `ask_without_the_package`
    does, and the others by kind, since a batch takes as long as its longest answer."""
    rest = sorted(range(1, len(items)), key=lambda place: list(KINDS).index(items[place].kind))
    batches = [[0], *(rest[first : first + _BATCH] for first in range(0, len(rest), _BATCH))]
    asked = [[Asked(items[place]) for place in batch] for batch in batches]
    answers: dict[int, dict[str, Any]] = {}
    with tqdm(desc="answers", total=len(items), unit="") as progress:
        for batch, given in zip(batches, Answerer(model, processor, _LONGEST)(asked), strict=True):
            for place, said in zip(batch, given, strict=True):
                item = items[place]
                judged = judged_line(Asked(item), said)
                right = f"{item.key}. {item.references[0]}" if item.options else right_answer(item)
                answers[place] = {
                    "panorama": item.panorama,
                    "question": ask_text(item),
                    "expected": right,
                    "answer": said.answer,
                    "kind": item.kind,
                    "right": judged["right"],
                    **({"steps": said.steps} if said.steps else {}),
                    **({"error": said.error} if said.error else {}),
                }
            progress.update(len(batch))
    return [answers[place] for place in range(len(items))]


def draw(folder: Path, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> None:
    """`views.png`: the panoramas with the places that were expected and answered, and how many answers are right."""
    pictures: dict[str, Image.Image] = {}
    for item, answer in zip(items, answers, strict=True):
        name = answer["panorama"]
        picture = pictures.get(name) or Image.open(folder / name)
        for places, colour in ((item.places or (), EXPECTED), (places_of(answer["answer"]), ANSWERED)):
            for place in places if item.places is not None else ():
                picture = draw_bfov(picture, place, colour)
        pictures[name] = picture
    (width, height), title = next(iter(pictures.values())).size, 28
    sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * (height + title)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, picture) in enumerate(pictures.items()):
        left, top = number % 2 * width, number // 2 * (height + title)
        own = [answer["right"] for answer in answers if answer["panorama"] == name]
        words = f"{name}: {sum(own)} of {len(own)} answers right; places expected in green, answered in red"
        pen.text((left + 8, top + 5), words, fill="black", font_size=16)
        sheet.paste(picture, (left, top + title))
    sheet.save(folder / "views.png")


def show(answers: Sequence[dict[str, Any]]) -> None:
    """Print every answer with its mark, and how many of each kind are right."""
    for name in dict.fromkeys(answer["panorama"] for answer in answers):
        print(f"\n{name}")
        for answer in answers:
            if answer["panorama"] == name:
                expected = "" if answer["right"] else f"   (expected {answer['expected']})"
                words = " / ".join(answer["question"].splitlines())
                print(f"  {'right' if answer['right'] else 'WRONG'}  {words}\n           {answer['answer']}{expected}")
    print(f"\n{'kind':<24}right")
    for kind in KINDS:
        own = [answer["right"] for answer in answers if answer["kind"] == kind]
        print(f"{kind:<24}{sum(own)} of {len(own)}")
    print(f"{'all':<24}{sum(answer['right'] for answer in answers)} of {len(answers)}")
    print("None of these scenes was trained on, nor any with these real panoramas around it.")


def ask_without_the_package(output: Path, one: dict[str, Any]) -> None:
    """Ask a question again in a process that has transformers and the folder only; exit where the answer differs."""
    print("\nThe same model in a new process without this package, by trust_remote_code=True:", flush=True)
    alone = output / "alone"
    alone.mkdir()
    row = {"file_name": f"../{one['panorama']}", "query": one["question"], "annotation": one["expected"]}
    (alone / METADATA).write_text(json.dumps(row) + "\n", encoding="utf-8")
    ask_file = Path(__file__).with_name("ask.py").resolve()
    paths = [str(path.resolve()) for path in (output / "model", alone, alone / "answers.json")]
    command = [sys.executable, "-P", str(ask_file), *paths, "--max-new-tokens", str(_LONGEST)]
    run = subprocess.run(command, cwd=output, env={**os.environ, "PYTHONPATH": "", "TQDM_DISABLE": "1"})
    if run.returncode:
        sys.exit(f"error: the folder {str(output / 'model')!r} does not answer without the package")
    (answer,) = json.loads((alone / "answers.json").read_text(encoding="utf-8"))
    print(f"  {one['panorama']}: {' / '.join(one['question'].splitlines())}\n  {answer['answer']}")
    if answer["answer"] != one["answer"]:
        sys.exit(f"error: with the package the answer is {one['answer']!r}")
    print("  the same answer as with the package")


if __name__ == "__main__":
    main()
