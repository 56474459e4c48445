"""Evaluations for tests: questions in the plainest form, without the readers and the prompts of released data sets."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from panorama_vlm.tests.launching import ENVIRONMENT, SAMPLES

# What stands for formats.py and prompts.py: a list of items as JSON, and the bare question.
READER = """
def read_items(path, *, split="train", images=None, format=None, limit=None):
    import json
    from panorama_vlm.evaluation.items import Item, ReadItems
    from panorama_vlm.places_panorama import BFoV
    items = []
    for row in json.load(open(path))[:limit]:
        if row.get("places") is not None:
            row["places"] = [BFoV(*place) for place in row["places"]]
        items.append(Item(**{**row, "options": [tuple(option) for option in row.get("options", [])]}))
    return ReadItems(items, [], "plain")


def ask_text(item):
    return item.question
"""
_INSTALL = """
import sys, types
for name in ("formats", "prompts"):
    module = types.ModuleType(f"panorama_vlm.evaluation.{name}")
    exec(READER, module.__dict__)
    sys.modules[module.__name__] = module
"""


def plain_reader(monkeypatch):
    """The plain reader in this process."""
    for name in ("formats", "prompts"):
        module = types.ModuleType(f"panorama_vlm.evaluation.{name}")
        exec(READER, module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def rows(count=10):
    """Questions of several kinds about real panoramas; one panorama is not there."""
    paths = sorted(map(str, SAMPLES.glob("*.jpg")))
    made = []
    for index in range(count):
        row: dict[str, Any] = {
            "id": f"q{index:02d}",
            "image": paths[index % 4],
            "panorama": f"p{index % 4}",
            "question": f"What? {index}",
        }
        if index % 4 == 0:
            row |= {"kind": "choice", "options": [["A", "front"], ["B", "left"]], "key": "B", "references": ["left"]}
            row |= {"more": {"turns": "direction"}}
        elif index % 4 == 1:
            row |= {"kind": "place", "references": [], "places": [[20, 0, 30, 20]]}
        elif index % 4 == 2:
            row |= {"kind": "caption", "references": ["a room", "a bright room"]}
        else:
            row |= {"kind": "count", "references": ["3"], "more": {"turns": "no"}}
        made.append(row)
    return [*made, {"id": "gone", "image": "none.jpg", "panorama": "p9", "question": "?", "references": ["x"]}]


def command(folder, processes, *arguments):
    """The evaluation of a folder's model on its questions, and the environment of it."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(f"READER = {READER!r}\n{_INSTALL}")
    (folder / "items.json").write_text(json.dumps(rows()))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    own = [str(folder / "model"), str(folder / "items.json"), "--batch-size", "2", "--max-new-tokens", "4"]
    words = [*launcher, "-m", "panorama_vlm.evaluation", *own, *map(str, arguments)]
    return words, {**ENVIRONMENT, "PYTHONPATH": path}


def launch(folder, *arguments, processes=1):
    words, environment = command(folder, processes, *arguments)
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def files(output):
    """What an evaluation has written, by name."""
    return {
        str(path.relative_to(output)): path.read_bytes() for path in sorted(Path(output).rglob("*")) if path.is_file()
    }
