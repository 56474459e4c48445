"""What is each part of the design worth? The same data, budget and language model, one part changed at a time.

`python -m panorama_vlm.benchmarks.ablation [--panoramas 6000 --seeds 0 1 2 --variants ...] --output build/ablation`
trains each variant from random weights by the trainer (`default_model.yaml` with a smaller language model, two stages:
`vision` on a third of the panoramas, `finetune` on the rest), asks it about scenes that no run trains on, and prints
accuracy by kind, image tokens, and the time of tower and language model a panorama. To fit a laptop, the scenes hold
solids alone and nothing real around them, and of all kinds of question those are asked that such a budget can teach.
What is done is not done again: `--output` holds a folder a run, and the trainer goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor
from ..synthetic.cutouts import VARIABLE
from ..synthetic.write import METADATA, World, row_of
from ..train.config import CONFIGS

BATCH = 4  # panoramas a step
_SEED = 31_337  # of the scenes that are asked about
_NO_OVERLAP = {"vicreg_loss_weight": 0.0}  # there is nothing to compare: labels alone
_LANGUAGE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}

Change = dict[str, Any]
# Of each variant what differs from the design: options of the model; `optimizer`, those of both stages; `from_random`,
# whether there is no stage `vision`.
VARIANTS: dict[str, Change] = {
    "the design": {},
    "one squeezed image": {"view_strategy": "resize", "pole_caps": False, "image_size": 288, **_NO_OVERLAP},
    "cubemap": {"view_strategy": "cubemap", "pole_caps": False, **_NO_OVERLAP},
    "tiles that touch": {"view_strategy": "tiles", **_NO_OVERLAP},
    "with a global view": {"view_strategy": "anyres_e2p"},
    "all tokens": {"token_selection": "all"},
    "no position code": {"position_encoding": "none"},
    "no stage 1": {"from_random": True},
    "stage 1: labels alone": {"vicreg_loss_weight": 0.0},
    "no views up and down": {"pole_caps": False},
    "the same, stage 1: strips": {
        "use_anyres_e2p_vicreg": False,
        "pole_caps": False,
    },  # strips know rows of views alone
    "AdamW": {"optimizer": {"optimizer": "adamw", "learning_rate": 5e-4, "learning_rates": {}}},
}
GROUPS = {
    "what is there": ("existence", "colour", "shape", "size"),
    "where": ("direction", "what_is_in_direction", "what_is_at_place"),
    "seam": ("adjacent_across_seam",),
    "frame of reference": ("order", "after_turning", "facing"),
    "places": ("grounding",),
}
KINDS = tuple(kind for group in GROUPS.values() for kind in group)
_RARE = "adjacent_across_seam"  # one scene in ten has something to ask about the seam
TABLES = (
    *("existence", "colour", "shape", "size", "direction", "heading", "what_is_in_direction", "what_is_at_place"),
    *("grounding", "order", "facing", "after_turning"),
)
DATA = (
    "synthetic://?scenes=1000000&seed=8&width=512&backgrounds=&steps=true&questions=6&tables=3"
    f"&kinds=all,{_RARE}:5".replace("all", ",".join(kind for kind in KINDS if kind != _RARE))
    + f"&table_kinds={','.join(TABLES)}"
)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.ablation", description=__doc__)
    parser.add_argument("--panoramas", type=int, default=6000, help="that each variant is trained on (default: 6000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS], metavar="NAME")
    parser.add_argument("--scenes", type=int, default=100, help="that are asked about (default: 100)")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--workers", type=int, default=0, help="processes a run that draw scenes (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("build/ablation"))
    options = parser.parse_args(arguments)
    if options.panoramas < 3 * BATCH:
        parser.error(f"--panoramas must be at least {3 * BATCH}, got {options.panoramas}")
    if not 1 <= options.parallel <= (os.cpu_count() or 1):
        parser.error(f"--parallel must be from 1 to {os.cpu_count()}, the cores there are, got {options.parallel}")
    os.environ[VARIABLE] = ""  # solids alone, here and in what is started
    scenes = write_scenes(options.output, options.scenes)
    wanted = [(name, seed) for name in options.variants for seed in options.seeds]
    with ThreadPoolExecutor(options.parallel) as runs:
        found = dict(zip(wanted, runs.map(lambda each: run(*each, options, scenes), wanted), strict=True))
    rows = {}
    for name in options.variants:
        own = [found[name, seed] | costs(folder_of(name, options.seeds[0], options), scenes) for seed in options.seeds]
        rows[name] = {key: [each[key] for each in own] for key in own[0]}
    (options.output / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(rows, options.output / "ablation.png")
    print(f"\n{header()}\n" + "\n".join(line(name, row) for name, row in rows.items()))
    print(
        f"Mean (and range) of {len(options.seeds)} seeds, {options.panoramas:,} panoramas, {options.scenes} asked about"
    )


def write_scenes(output: Path, count: int) -> Path:
    """The scenes with questions of every kind, written once; as many again that are asked about the seam."""
    folder = output / f"scenes-{count}"
    if (folder / METADATA).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rest = tuple(kind for kind in KINDS if kind != _RARE)
    rows = []
    for world in (World(_SEED, 512, len(KINDS), rest), World(_SEED + 1, 512, 1, (_RARE,))):
        for number in range(count):
            scene = world.scene(number)
            file = f"{world.seed}-{number}.png"
            world.picture(scene).save(folder / file)
            rows.append(json.dumps(row_of(scene, world.ask(scene), file)))
    (folder / METADATA).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def configuration(name: str, seed: int, panoramas: int, workers: int) -> tuple[dict[str, Any], list[str]]:
    """What the trainer is given, and the stages to train, in order."""
    config = yaml.safe_load((CONFIGS / "default_model.yaml").read_text(encoding="utf-8"))
    change = dict(VARIANTS[name])
    optimizer, from_random = change.pop("optimizer", {}), change.pop("from_random", False)
    config["options"] |= change
    config["compose"]["language"] |= _LANGUAGE
    config["data"] = [{"path": DATA}]
    del config["vision"]["data"], config["resampler"], config["finetune"]["data"]
    first = 0 if from_random else panoramas // 3
    steps = {"vision": max(1, first // BATCH), "finetune": (panoramas - first) // BATCH}
    for stage, count in steps.items():
        config[stage] |= {"max_steps": count, "batch_size": BATCH, **optimizer}
    config |= {"seed": seed, "num_workers": workers, "log_every": 25, "save_every": 250, "keep_checkpoints": 1}
    return config, ["finetune"] if from_random else ["vision", "finetune"]


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run has its models and results."""
    return Path(options.output, f"{_plain(name)}-{options.panoramas}-{seed}")


def _plain(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def run(name: str, seed: int, options: argparse.Namespace, scenes: Path) -> dict[str, Any]:
    """Train and ask one variant; what is worth to know of it."""
    folder = folder_of(name, seed, options)
    folder.mkdir(parents=True, exist_ok=True)
    config, stages = configuration(name, seed, options.panoramas, options.workers)
    file = folder / "ablation.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    for stage in stages:  # each from the one before, which the trainer finds
        if not (folder / stage / "config.json").is_file():
            _call(options, "panorama_vlm.train", str(file), "--stage", stage, "--output", str(folder))
    model, results = folder / "finetune", folder / f"results-{options.scenes}"
    if not (results / "metrics.json").is_file():
        longest = ["--max-new-tokens", "48", "--batch-size", "32"]
        _call(options, "panorama_vlm.evaluation", str(model), str(scenes), "--output", str(results), *longest)
    metrics = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    kinds = {kind: metrics["kinds"][kind]["accuracy"] for kind in KINDS if kind in metrics["kinds"]}
    shares = {}
    for group, own in GROUPS.items():
        asked = [kinds[kind] for kind in own if kind in kinds]
        if not asked:
            raise ValueError(f"of {', '.join(own)} nothing was asked in {options.scenes} scenes: use more --scenes")
        shares[group] = statistics.mean(asked)
    found = {"mean": statistics.mean(kinds.values()), **shares, "kinds": kinds}
    print(name, seed, *(f"{key} {100 * share:.1f}" for key, share in list(found.items())[:-1]), sep=", ", flush=True)
    return found


def _call(options: argparse.Namespace, module: str, *arguments: str) -> None:
    threads = str((os.cpu_count() or 1) // options.parallel)
    subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": threads}
    )


def costs(run_folder: Path, scenes: Path) -> dict[str, Any]:
    """Image tokens, and milliseconds of the tower (with resampler and projection) and of the language model's first
    pass for one panorama and a short question."""
    folder = run_folder / "finetune"
    model = PanoramaVLM.from_checkpoint(folder, dtype=torch.float32).eval()
    processor = PanoramaProcessor.from_pretrained(folder)
    content = [
        {"type": "image", "path": str(scenes / f"{_SEED}-0.png")},
        {"type": "text", "text": "Can you see a red ball?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        **{"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"},
    )
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    with torch.inference_mode():
        tower = _milliseconds(lambda: model.get_image_features(inputs["pixel_values"]))
        whole = _milliseconds(lambda: model(**inputs))
    return {"image tokens": tokens, "tower ms": tower, "language model ms": max(0.0, whole - tower)}


def _milliseconds(call: Callable[[], Any], times: int = 9) -> float:
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(took)


_COLUMNS = ("mean", *GROUPS, "image tokens", "tower ms", "language model ms")


def header() -> str:
    """The head of the table, in Markdown."""
    return "| | " + " | ".join(_COLUMNS) + " |\n|" + "---|" * (len(_COLUMNS) + 1)


def line(name: str, row: dict[str, list[Any]]) -> str:
    """A line of the table: accuracies in percent, means of the seeds with their range where there are several."""
    return f"| {name} | " + " | ".join(_cell(column, row[column]) for column in _COLUMNS) + " |"


def _cell(column: str, values: Sequence[float]) -> str:
    share = column == "mean" or column in GROUPS
    shown = [100 * value if share else value for value in values]
    words = f"{statistics.mean(shown):.{1 if share else 0}f}"
    return words + (f" ({min(shown):.1f} to {max(shown):.1f})" if share and len(shown) > 1 else "")


def draw(rows: dict[str, dict[str, list[Any]]], path: Path) -> None:
    """Bars: accuracy by group of kinds for each variant, with the range of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(GROUPS), 0.4 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    places = [*range(len(rows) - 1, -1, -1)]
    for number, (group, axis) in enumerate(zip(GROUPS, figure.subplots(1, len(GROUPS), sharey=True), strict=True)):
        values = [[100 * value for value in row[group]] for row in rows.values()]
        means = [statistics.mean(each) for each in values]
        below = [mean - min(each) for mean, each in zip(means, values, strict=True)]
        above = [max(each) - mean for mean, each in zip(means, values, strict=True)]
        axis.barh(places, means, xerr=[below, above], color=["tab:blue", *["tab:grey"] * (len(rows) - 1)], height=0.7)
        axis.set(title=group, xlim=(0, 100), xlabel="right, %")
        if number == 0:
            axis.set_yticks(places, [*rows])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
