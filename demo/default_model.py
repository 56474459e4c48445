"""Ask a model of `default_model.yaml` about scenes that it was never trained on, in seconds.

`python -m panorama_vlm.demo.default_model --model runs/default/finetune --output build/unseen`. Half of the scenes have
one of two real panoramas around them that training never had. It leaves `scenes/` (the panoramas and what is asked),
`answers.json`, `views.png` (the places of the answers: expected in green, answered in red), `report.html` of the
evaluation, and `model/`; without `--model` it asks the one at the root of the repository, where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from ..evaluation.evaluate import EvaluationOptions, evaluate, load_ours
from ..places_panorama import draw_bfov, read_places
from ..synthetic.questions import KINDS
from ..synthetic.write import SAMPLES, World, write_scenes

ROOT = Path(__file__).resolve().parent.parent
SEED = 2026  # no configuration trains on it
UNSEEN = ("lab", "park")  # panoramas that are around no scene of default_model.yaml
_LARGEST = 128  # new tokens: the steps and places of a long list


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.demo.default_model", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/unseen"), help="folder for everything it makes")
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of the model (default: the repository)")
    parser.add_argument("--scenes", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--questions", type=int, default=10, help="a scene, at most (default: 10)")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        print(f"error: there is no model in {str(options.model)!r} (config.json is missing)", file=sys.stderr)
        sys.exit(2)
    output: Path = options.output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)

    _copy_model(options.model, output / "model")
    backgrounds = f"{SAMPLES}:{','.join(UNSEEN)}"
    world = World(seed=SEED, width=1024, questions=options.questions, backgrounds=backgrounds)
    write_scenes(output / "scenes", world, options.scenes, processes=1)
    asked = EvaluationOptions(
        str(output / "model"), str(output / "scenes"), output=str(output), batch_size=8, max_new_tokens=_LARGEST
    )
    evaluate(asked, Accelerator(cpu=True))
    answers = _answers(output)
    (output / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _draw(output, answers)
    _show(answers)
    print(
        f"\nModel: {output / 'model'}  answers: {output / 'answers.json'}  pictures: {output / 'views.png'}", flush=True
    )
    _ask_without_the_package(output, answers)


def _copy_model(source: Path, target: Path) -> None:
    """The model and its processor, saved as anybody would who has loaded them."""
    model, processor = load_ours(str(source), Accelerator(cpu=True))
    model.save_pretrained(target)
    processor.save_pretrained(target)


def _answers(output: Path) -> list[dict[str, Any]]:
    """Every question with what was expected and answered, in order."""
    rows = [json.loads(line) for line in (output / "scenes" / "metadata.jsonl").read_text("utf-8").splitlines()]
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text("utf-8").splitlines()]
    said = iter(lines)
    answers = []
    for row in rows:
        expected = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        for question, kind, wanted, options in zip(
            row["questions"], row["kinds"], expected, row["options"], strict=True
        ):
            line = next(said)
            words = "\n".join([question, *(f"{key}. {text}" for key, text in options or ())])
            answer = {"panorama": row["file_name"], "question": words, "expected": wanted, "answer": line["answer"]}
            answers.append({**answer, "kind": kind, "right": line["right"]})
    return answers


def _draw(output: Path, answers: list[dict[str, Any]]) -> None:
    """The panoramas one below the other, with the places that were expected and answered."""
    pictures: dict[str, Image.Image] = {}
    for answer in answers:
        if answer["panorama"] not in pictures:
            with Image.open(output / "scenes" / answer["panorama"]) as image:
                pictures[answer["panorama"]] = image.convert("RGB")
        if answer["kind"].startswith("grounding"):
            for text, colour in ((answer["expected"], "lime"), (answer["answer"], "red")):
                for found in read_places(text):
                    pictures[answer["panorama"]] = draw_bfov(pictures[answer["panorama"]], found.place, colour)
    width, height = next(iter(pictures.values())).size
    sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height))
    for number, picture in enumerate(pictures.values()):
        sheet.paste(picture, (number % 2 * width, number // 2 * height))
    sheet.save(output / "views.png")


def _show(answers: list[dict[str, Any]]) -> None:
    """A few answers, and how many are right of each kind."""
    for answer in answers[:: max(1, len(answers) // 12)]:
        mark = {True: "right", False: "WRONG", None: "     "}[answer["right"]]
        words = answer["question"].replace("\n", "  ")
        print(f"\n{answer['panorama']}: {words}\n  expected  {answer['expected']}\n  {mark}     {answer['answer']}")
    print(f"\n{'kind':<24}right")
    for kind in KINDS:
        own = [answer["right"] for answer in answers if answer["kind"] == kind]
        if own:
            print(f"{kind:<24}{'captions are not judged' if None in own else f'{sum(own)} of {len(own)}'}")
    judged = [answer["right"] for answer in answers if answer["right"] is not None]
    print(f"{'all':<24}{sum(judged)} of {len(judged)}")
    print("None of these scenes was trained on, nor any with these real panoramas around it.")


def _ask_without_the_package(output: Path, answers: list[dict[str, Any]]) -> None:
    """Three lines of transformers in a process without this package, on one of the scenes; exits where it fails."""
    one = next(answer for answer in answers if "\n" not in answer["question"] and answer["right"] is not None)
    folder = output / "alone"
    folder.mkdir()
    shutil.copy(output / "scenes" / one["panorama"], folder)
    row = {"file_name": one["panorama"], "query": one["question"], "annotation": one["expected"]}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    print("\nThe same model in a new process without this package, by trust_remote_code=True:", flush=True)
    ask = Path(__file__).with_name("ask.py").resolve()
    paths = [str(path.resolve()) for path in (output / "model", folder, folder / "answers.json")]
    environment = {**os.environ, "PYTHONPATH": "", "TQDM_DISABLE": "1"}
    paths += ["--max-new-tokens", str(_LARGEST)]
    subprocess.run([sys.executable, str(ask), *paths], check=True, cwd=output, env=environment)
    (alone,) = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    print(f"  {alone['question']}  {alone['answer']}")
    if alone["answer"].rpartition("</think>")[2].strip() != one["answer"]:
        sys.exit(f"error: with the package the answer is {one['answer']!r}")


if __name__ == "__main__":
    main()
