"""What is each part of the design worth? The same data, budget and language model, one part changed at a time.

`python -m panorama_vlm.benchmarks.ablation [--model . --panoramas 1200 --seeds 0 1 2 --variants ... --parallel 2]`
changes a trained model: other views and tokens, or parts that start anew and are taught by another stage 1, position
code or optimizer. Each variant is trained on for some panoramas by the trainer and asked; those of which nothing starts
anew are asked before, too. It takes 15 to 25 minutes a variant and core. The model learned by the design, so what
others lose is at most what is shown; parts that start anew are equal among themselves.

The scenes hold solids alone and nothing real around them, and no run trains on those that are asked about. Printed are
accuracy by kind, image tokens, and the time of tower and language model a panorama. What is done is not done again:
`--output` holds a folder a run, and the trainer goes on where it was stopped.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from ..configuration_panorama import PanoramaConfig
from ..modeling_panorama import PanoramaVLM
from ..processing_panorama import PanoramaProcessor
from ..synthetic.cutouts import VARIABLE
from ..synthetic.write import METADATA, World, row_of
from ..train.build import load_start
from ..train.config import CONFIGS, TrainConfig

BATCH = 4  # panoramas a step
_SEED = 31_337  # of the scenes that are asked about


@dataclass(frozen=True)
class Variant:
    """What differs from the design.

    Attributes:
        options: of the model.
        anew: parts of the model that start as if they had learned nothing.
        stage_1: options of stage `vision`, which a quarter of the panoramas is for; without it there is none.
        optimizer: options of both stages.
    """

    options: dict[str, Any] = field(default_factory=dict)
    anew: tuple[str, ...] = ()
    stage_1: dict[str, Any] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def learns_to_look(self) -> bool:
        """Whether the language model has to find its way in the image tokens anew."""
        return bool(self.anew) or "position_encoding" in self.options


_CODE, _RESAMPLER = ("projection.ray",), ("resampler",)
_ROWS = {"pole_caps": False}  # strips know rows of views alone
_TAUGHT = {"label_loss_weight": 1.0, "learning_rate": 1.2e-3, "learning_rates": {"vision_tower": 1.5e-4}}
VARIANTS = {
    "the design": Variant(),
    "one squeezed image": Variant({"view_strategy": "resize", "pole_caps": False, "image_size": 288}),
    "cubemap": Variant({"view_strategy": "cubemap", "pole_caps": False}),
    "four tiles that touch": Variant({"view_strategy": "tiles", "pole_caps": False}),
    "with a global view": Variant({"view_strategy": "anyres_e2p"}),
    "all tokens": Variant({"token_selection": "all"}),
    "no views up and down": Variant({"pole_caps": False}),
    "no position code": Variant({"position_encoding": "none"}),
    "position code anew": Variant(anew=_CODE),
    "position code anew, AdamW": Variant(anew=_CODE, optimizer={"optimizer": "adamw"}),
    "resampler anew": Variant(anew=_RESAMPLER),
    "resampler anew, stage 1: labels alone": Variant({"vicreg_loss_weight": 0.0}, _RESAMPLER, _TAUGHT),
    "resampler anew, stage 1: labels and rays": Variant({}, _RESAMPLER, _TAUGHT),
    "resampler anew, stage 1: rays, no views up and down": Variant(_ROWS, _RESAMPLER, _TAUGHT),
    "resampler anew, stage 1: strips, no views up and down": Variant(
        _ROWS | {"use_anyres_e2p_vicreg": False}, _RESAMPLER, _TAUGHT
    ),
}
GROUPS = {
    "what is there": ("existence", "colour", "shape", "size"),
    "where": ("direction", "what_is_in_direction", "what_is_at_place"),
    "seam": ("adjacent_across_seam",),
    "frame of reference": ("order", "after_turning", "facing"),
    "places": ("grounding",),
}
_GENTLY = {"learning_rate": 5e-4, "learning_rates": {"vision_tower": 1.5e-4}}  # a model that has learned
_BOLDLY = {"learning_rate": 1e-3, "learning_rates": {"vision_tower": 5e-4}}  # one that has to learn to look again
KINDS = tuple(kind for group in GROUPS.values() for kind in group)
_RARE = "adjacent_across_seam"  # one scene in ten has something to ask about the seam
TABLES = (
    *("existence", "colour", "shape", "size", "direction", "heading", "what_is_in_direction", "what_is_at_place"),
    *("grounding", "order", "facing", "after_turning"),
)
DATA = (  # a model that has learned to look needs fewer tables, and gets more panoramas for the same time
    "synthetic://?scenes=1000000&seed=8&width=512&backgrounds=&steps=true&questions=6&tables={tables}"
    f"&kinds={','.join(kind for kind in KINDS if kind != _RARE)},{_RARE}:5&table_kinds={','.join(TABLES)}"
)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m panorama_vlm.benchmarks.ablation", description=__doc__)
    parser.add_argument("--model", default=".", help="folder or Hub id that every variant starts from (default: .)")
    parser.add_argument("--panoramas", type=int, default=1200, help="that each variant is trained on (default: 1200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[*VARIANTS],
        metavar="NAME",
        help=f"of {[*VARIANTS]} (default: other views and tokens alone)",
    )
    parser.add_argument("--scenes", type=int, default=100, help="that are asked about (default: 100)")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--workers", type=int, default=0, help="processes a run that draw scenes (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("build/ablation"))
    options = parser.parse_args(arguments)
    options.variants = options.variants or [name for name, each in VARIANTS.items() if not each.learns_to_look]
    if options.panoramas < 8 * BATCH:
        parser.error(f"--panoramas must be at least {8 * BATCH}, got {options.panoramas}")
    if not 1 <= options.parallel <= (os.cpu_count() or 1):
        parser.error(f"--parallel must be from 1 to {os.cpu_count()}, the cores there are, got {options.parallel}")
    os.environ[VARIABLE] = ""  # solids alone, here and in what is started
    scenes = write_scenes(options.output, options.scenes)
    wanted = [(name, seed) for name in options.variants for seed in options.seeds]
    for name, seed in wanted:
        prepare(name, seed, options)
    with ThreadPoolExecutor(options.parallel) as runs:
        done = runs.map(lambda each: run(each[0], each[1], options, scenes), wanted)
        found = dict(zip(wanted, done, strict=True))
    rows = {}
    for name in options.variants:
        spent = costs(folder_of(name, options.seeds[0], options) / "finetune", scenes)
        own = [found[name, seed] | spent for seed in options.seeds]
        rows[name] = {key: [each[key] for each in own] for key in own[0]}
    (options.output / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(rows, options.output / "ablation.png")
    print(f"\n{header(next(iter(rows.values())))}\n" + "\n".join(line(name, row) for name, row in rows.items()))
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


def configuration(name: str, seed: int, panoramas: int, workers: int = 0) -> tuple[dict[str, Any], list[str]]:
    """What the trainer is given, and the stages to train, in order."""
    variant = VARIANTS[name]
    config = yaml.safe_load((CONFIGS / "default_model.yaml").read_text(encoding="utf-8"))
    del config["compose"], config["options"], config["resampler"]
    del config["vision"]["data"], config["finetune"]["data"]
    config["data"] = [{"path": DATA.format(tables=3 if variant.learns_to_look else 1)}]
    first = 0 if variant.stage_1 is None else panoramas // 4
    config["vision"] |= variant.stage_1 or {}
    config["finetune"] |= _BOLDLY if variant.learns_to_look else _GENTLY
    for stage, count in {"vision": first, "finetune": panoramas - first}.items():
        config[stage] |= {"max_steps": max(1, count // BATCH), "batch_size": BATCH, **variant.optimizer}
    if not first:
        del config["vision"]
    config |= {"seed": seed, "num_workers": workers, "log_every": 25, "save_every": 250, "keep_checkpoints": 1}
    return config, ["vision", "finetune"] if first else ["finetune"]


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run has its models and results."""
    plain = re.sub(r"\W+", "-", name)
    return Path(options.output, f"{plain}-{options.panoramas}-{seed}")


def prepare(name: str, seed: int, options: argparse.Namespace) -> None:
    """Write what a run is given: its configuration, and the model that it starts from, changed."""
    folder = folder_of(name, seed, options)
    folder.mkdir(parents=True, exist_ok=True)
    written, _ = configuration(name, seed, options.panoramas, options.workers)
    told = json.loads(json.dumps({"model": options.model, **asdict(VARIANTS[name]), "trainer": written}))
    file = folder / "ablation.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != told:
        raise SystemExit(f"{folder} holds a run with other options: choose another --output, or remove it")
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (folder / "ablation.yaml").write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    if not (folder / "moved" / "processor_config.json").is_file():
        for part in change(options.model, VARIANTS[name], seed):
            part.save_pretrained(folder / "moved")


def change(path: str, variant: Variant, seed: int) -> tuple[PanoramaVLM, PanoramaProcessor]:
    """The model at `path` (a folder or a Hub id) with a variant's options, what starts anew forgotten, and its
    processor."""
    kept = {key: value for key, value in variant.options.items() if key != "position_encoding"}
    model, processor = load_start(TrainConfig(model=path, options=kept))
    weights = model.state_dict()
    torch.manual_seed(_SEED + seed)  # not a seed that the model itself may have started from
    fresh = PanoramaVLM(PanoramaConfig.from_dict(model.config.to_dict() | variant.options))
    forgotten = tuple(f"{model.base_model_prefix}.{part}." for part in variant.anew)
    own = fresh.state_dict()
    fresh.load_state_dict({key: own[key] if key.startswith(forgotten) else weights[key] for key in own})
    return fresh, processor


def run(name: str, seed: int, options: argparse.Namespace, scenes: Path) -> dict[str, Any]:
    """Train and ask one variant; where nothing of it starts anew it is asked before, too."""
    folder = folder_of(name, seed, options)
    _, stages = configuration(name, seed, options.panoramas, options.workers)
    found: dict[str, Any] = {"as it is": None}
    if not VARIANTS[name].anew:
        found["as it is"] = accuracies(folder / "moved", folder, options, scenes)["mean"]
    for stage in stages:  # each from the one before, which the trainer finds
        if not (folder / stage / "config.json").is_file():
            own = ["--model", str(folder / "moved"), "--stage", stage, "--output", str(folder)]
            _call(options, "panorama_vlm.train", str(folder / "ablation.yaml"), *own)
    found |= accuracies(folder / "finetune", folder, options, scenes)
    shown = [f"{key} {100 * share:.1f}" for key, share in found.items() if key != "kinds" and share is not None]
    print(name, f"seed {seed}", *shown, sep=", ", flush=True)
    return found


def accuracies(model: Path, folder: Path, options: argparse.Namespace, scenes: Path) -> dict[str, Any]:
    """Ask a model; the share of right answers by kind, the means of groups of them, and that of all kinds."""
    results = folder / f"{model.name}-results-{options.scenes}"
    if not (results / "metrics.json").is_file():
        longest = ["--max-new-tokens", "48", "--batch-size", "32", "--metrics", "accuracy", "places"]
        _call(options, "panorama_vlm.evaluation", str(model), str(scenes), "--output", str(results), *longest)
    metrics = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    kinds = {kind: metrics["kinds"][kind]["accuracy"] for kind in KINDS if kind in metrics["kinds"]}
    if missing := [kind for kind in KINDS if kind not in kinds]:
        raise ValueError(f"of {', '.join(missing)} nothing was asked in {options.scenes} scenes: use more --scenes")
    groups = {group: statistics.mean(kinds[kind] for kind in own) for group, own in GROUPS.items()}
    return {"mean": statistics.mean(kinds.values()), **groups, "kinds": kinds}


def _call(options: argparse.Namespace, module: str, *arguments: str) -> None:
    threads = str((os.cpu_count() or 1) // options.parallel)
    subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": threads}
    )


def costs(folder: Path, scenes: Path) -> dict[str, Any]:
    """Image tokens, and milliseconds of the tower (with resampler and projection) and of the language model's first
    pass for one panorama and a short question."""
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


_SHARES = ("as it is", "mean", *GROUPS)
_COLUMNS = (*_SHARES, "image tokens", "tower ms", "language model ms")


def header(row: dict[str, list[Any]]) -> str:
    """The head of the table, in Markdown."""
    columns = [column for column in _COLUMNS if column in row]
    return "| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1)


def line(name: str, row: dict[str, list[Any]]) -> str:
    """A line of the table: accuracies in percent, means of the seeds with their range where there are several."""
    return f"| {name} | " + " | ".join(_cell(column, row[column]) for column in _COLUMNS if column in row) + " |"


def _cell(column: str, values: Sequence[float | None]) -> str:
    share = column in _SHARES
    shown = [100 * value if share else value for value in values if value is not None]
    if not shown:
        return ""
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
