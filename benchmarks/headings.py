"""What is it worth to ask at several headings and take the answer that most of them give?

`python -m panorama_vlm.benchmarks.headings [fresh --model . --kinds count caption_around --limit 100]`: questions about
rendered scenes, a folder by `panorama_vlm.synthetic`, asked at 8 headings each by `pipe(..., headings=8)`. The votes of
4 and 8 of them stand beside the answer at the front alone, with the time a question takes; the peer is asking once. A
second table has how often the answer of 8 is right, by how many of them agree.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.answers import compare_places, says
from ..evaluation.bootstrap import by_panorama, drawn_means, interval
from ..headings_panorama import elect
from ..modeling_panorama import PanoramaVLM
from ..pipeline_panorama import PanoramaPipeline
from ..places_panorama import BFoV, read_places
from ..processing_panorama import PanoramaProcessor
from ..synthetic.write import METADATA

KINDS = {"count": False, "grounding_all": False, "caption_around": True}  # and whether words of direction turn
HEADINGS, VOTES = 8, (1, 4, 8)
AGREE = (("7 or 8", 7, 8), ("5 or 6", 5, 6), ("fewer", 1, 4))


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.headings", description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=Path("fresh"), help="folder of scenes (default: fresh)")
    parser.add_argument("--model", default=".", help="folder of the model (default: .)")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS], help="of questions (default: all)")
    parser.add_argument("--limit", type=int, help="questions of a kind, at most (default: all)")
    options = parser.parse_args(arguments)
    if not (options.data / METADATA).is_file():
        print(f"There are no scenes in {options.data}: see docs/default_model.md.")
        return
    model = PanoramaVLM.from_checkpoint(options.model, dtype=torch.float32).eval()
    pipe = PanoramaPipeline(model, processor=PanoramaProcessor.from_pretrained(options.model), device="cpu")
    print("| kind | asked once | 4 headings | 8 headings | right at one of 8 | questions | ms once | ms at 8 |")
    print("|---|---|---|---|---|---|---|---|")
    agreed = []
    for kind in options.kinds:
        asked = questions(options.data, kind)[: options.limit]
        if not asked:
            parser.error(f"there is no question of kind {kind} in {options.data}")
        right, agreeing, *seconds = ask(pipe, asked, KINDS[kind])
        print(line(kind, [each["file"] for each in asked], right, *seconds), flush=True)
        agreed.append(agreement_line(kind, [row[-2] for row in right], agreeing))
    print(
        f"\n| right where so many of {HEADINGS} agree | "
        + " | ".join(name for name, *_ in AGREE)
        + " |\n|---|---|---|---|"
    )
    print("\n".join(agreed))


def questions(data: Path, kind: str) -> list[dict[str, Any]]:
    """Those of a kind: file, words, answer and places of each."""
    found = []
    for line in (data / METADATA).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for number, own in enumerate(row["kinds"]):
            if own == kind:
                answer = row["conversations"][2 * number + 1]["value"].rpartition("</think>")[2]
                words, places = row["questions"][number], row["places"][number]
                file = str(data / row["file_name"])
                found.append({"file": file, "words": words, "answer": answer, "places": places})
    return found


def ask(
    pipe: PanoramaPipeline, asked: Sequence[dict[str, Any]], turn_words: bool
) -> tuple[list[list[bool]], list[int], float, float]:
    """Of each question, whether it is right asked once, by 4 and 8 votes, and at one of 8 at least, and how many of 8
    agree; the seconds that one takes, and those of asking once, of a tenth of them."""
    own: dict[str, Any] = {"max_new_tokens": 192, "batch_size": HEADINGS}
    right, agreeing = [], []
    begin = time.perf_counter()
    for each in asked:
        said = pipe(each["file"], each["words"], headings=HEADINGS, turn_words=turn_words, **own)
        votes = said["votes"]
        agreeing.append(round(HEADINGS * said["agreement"]))
        elected = [votes[:: HEADINGS // count] for count in VOTES]
        chosen = [some[elect(some)[0]] or "" for some in elected]
        row = [is_right(answer, each) for answer in chosen]
        right.append([*row, any(is_right(answer or "", each) for answer in votes)])
    middle = time.perf_counter()
    once = asked[::10]
    for each in once:
        pipe(each["file"], each["words"], **own)
    return right, agreeing, (middle - begin) / len(asked), (time.perf_counter() - middle) / len(once)


def is_right(answer: str, expected: dict[str, Any]) -> bool:
    """As the evaluation has it: the same words, or places that overlap."""
    if expected["places"] is None:
        return says(answer, [expected["answer"]])
    places = [BFoV(*place) for place in expected["places"]]
    return bool(answer.strip() and compare_places(places, [each.place for each in read_places(answer)])["right"])


def line(kind: str, files: Sequence[str], right: list[list[bool]], voted: float, once: float) -> str:
    """A line of the table: percent right, with 95 % intervals by bootstrap over panoramas of the first and the last."""
    shares = [100 * sum(row[number] for row in right) / len(right) for number in range(1 + len(VOTES))]
    cells = [f"{share:.1f}" for share in shares]
    for number in (0, len(VOTES) - 1):
        sums, counts, _ = by_panorama([float(row[number]) for row in right], files, [kind] * len(right))
        edges = interval(drawn_means(sums, counts))
        cells[number] += "" if edges is None else f" ({100 * edges[0]:.0f} to {100 * edges[1]:.0f})"
    return f"| `{kind}` | " + " | ".join([*cells, str(len(right)), f"{1e3 * once:.0f}", f"{1e3 * voted:.0f}"]) + " |"


def agreement_line(kind: str, right: Sequence[bool], agreeing: Sequence[int]) -> str:
    """A line of the second table: percent right of how many answers, by how many headings agree."""
    cells = []
    for _, least, most in AGREE:
        own = [each for each, votes in zip(right, agreeing, strict=True) if least <= votes <= most]
        cells.append(f"{100 * sum(own) / len(own):.0f} % of {len(own)}" if own else "none")
    return f"| `{kind}` | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
