"""Results into the card of a model: `python -m panorama_vlm.evaluation.card MODEL RESULTS`.

What an evaluation has measured goes into the `README.md` of a saved folder, as a section for readers and as
`model-index` for the Hub. A folder without a card gets one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..configuration_panorama import PanoramaConfig
from ..train.card import FOLDER, NOT_EVALUATED, table, write_model_card
from .evaluate import METRICS_FILE, MODEL_INDEX
from .report import rows_of

SECTION = "Evaluation"


def add_results(
    folder: str | os.PathLike[str],
    results: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Write what an evaluation found into the card of a folder; results of the same data from before are replaced.

    Args:
        folder: of the model.
        results: `output` of an evaluation of it.
        repo_id: of the Hub, under which the card shows how to load it.
        license: as the Hub names it, such as `"apache-2.0"`.

    Returns:
        The path of the card.

    Raises:
        ValueError: where one of the two folders is none of a model or of results.
    """
    folder, results = Path(folder), Path(results)
    for where, name in ((folder, "config.json"), (results, METRICS_FILE), (results, MODEL_INDEX)):
        if not (where / name).is_file():
            raise ValueError(
                f"{str(where)!r} holds no {name}: give the folder of a model, then the output of its evaluation"
            )
    path = folder / "README.md"
    if not path.is_file():
        run = {"repo_id": repo_id, "license": license}
        write_model_card(folder, config=PanoramaConfig.from_pretrained(folder), run=run)
    card = ModelCard.load(path)
    metrics = json.loads((results / METRICS_FILE).read_text(encoding="utf-8"))
    index = yaml.safe_load((results / MODEL_INDEX).read_text(encoding="utf-8"))["model-index"]
    found: list[EvalResult] = model_index_to_eval_results(index)[1]
    measured = {result.dataset_name for result in found}
    kept = [result for result in card.data.eval_results or [] if result.dataset_name not in measured]
    card.data.eval_results = kept + found
    card.data.model_name = card.data.model_name or folder.resolve().name
    card.data.license = license or card.data.license
    card.text = _with_section(card.text, _section(metrics))
    if repo_id:
        card.text = card.text.replace(FOLDER, repo_id)
    card.save(path)
    return path


def _section(metrics: dict[str, Any]) -> str:
    settings = metrics["settings"]
    extra = [f"{settings['headings']} headings"] * (settings["headings"] > 1) + [f"tilt {settings['tilt']:g}°"] * bool(
        settings["tilt"]
    )
    words = ", ".join([f"split `{settings['split']}`", settings["decoding"], *extra])
    data = Path(settings["data"]).name
    return (
        f"{metrics['count']:,} questions about {metrics['panoramas']:,} panoramas of `{data}` ({words}). The interval "
        f"is of {settings['interval']}; chance is {settings['chance']}.\n\n"
        + table(["", "value", "95 % interval", "chance", "questions"], rows_of(metrics))
    )


def _with_section(text: str, body: str) -> str:
    """The card with the section, before that on limits, instead of one from before."""
    text = re.sub(rf"^## {SECTION}\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    text = text.replace(f"- {NOT_EVALUATED}\n", "").replace(f"\n- {NOT_EVALUATED}", "")
    before, limits, after = text.partition("## Limits\n")
    return f"{before.rstrip()}\n\n## {SECTION}\n\n{body}\n\n{limits}{after}"


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.evaluation.card",
        description="Put the results of an evaluation into a model's card.",
    )
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("results", help="output folder of its evaluation")
    parser.add_argument("--repo", help="of the Hub: org/name, under which the card shows how to load it")
    parser.add_argument("--license", help="as the Hub names it, such as apache-2.0")
    options = parser.parse_args(arguments)
    try:
        print(add_results(options.model, options.results, repo_id=options.repo, license=options.license))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
