"""Scenes as a folder that the trainer and the evaluation read as it is."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..options_panorama import check_option_names
from ..token_labels_panorama import LabelMaps
from .cutouts import LICENCE, available, is_left_out
from .questions import KINDS, Question, ask, read_weights
from .render import look, render_erp
from .scenes import COLOURS, SHAPES, SIZES, Scene, make_scene, seed_of
from .tables import TABLES, Table, tables

logger = logging.getLogger(__name__)

METADATA, SCENES, SETTINGS = "metadata.jsonl", "scenes.jsonl", "synthetic.json"
LETTER = "Answer with the letter of the right option."
SAMPLES = Path(__file__).resolve().parent.parent / "samples"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_ATTEMPTS = 100
_SHEET = 24  # scenes on a contact sheet


@dataclass(frozen=True)
class World:
    """What decides scenes and questions, beside their number.

    Args:
        seed: another one gives other scenes throughout.
        width: of the panoramas in pixels; they are half as high.
        questions: a scene, at most.
        kinds: of questions; all where none is named. `count:2` is wanted twice as often, `all` is each not named.
        backgrounds: folder of real panoramas that every second scene has around it; `FOLDER:name,name` names some.
        unknown: whether cut-outs are those that training never has.
        tables: a scene, at most: conversations that ask the same of many things.
        table_kinds: of tables, in the same way.
        steps: whether answers carry the steps that lead to them, `<think>STEPS</think>ANSWER`, where there are any.
        vary_backgrounds: whether real panoramas are changed from scene to scene (`varied`), for training: a few of them
            are soon known by heart, and what is in others is taken for things.
    """

    seed: int = 0
    width: int = 1024
    questions: int = 8
    kinds: tuple[str, ...] = ()
    backgrounds: str | None = None
    unknown: bool = False
    tables: int = 0
    table_kinds: tuple[str, ...] = ()
    steps: bool = False
    vary_backgrounds: bool = False

    def __post_init__(self) -> None:
        if self.width < 64 or self.width % 2:
            raise ValueError(f"width must be even and at least 64, got {self.width}. Typical value: 1024")
        if self.questions < 1:
            raise ValueError(f"questions must be at least 1, got {self.questions}. Typical value: 8")
        if self.tables < 0:
            raise ValueError(f"tables must be at least 0, got {self.tables}. Typical value: 4")
        read_weights(self.kinds, tuple(KINDS), "the kinds of questions")
        read_weights(self.table_kinds, tuple(TABLES), "the kinds of tables")
        if self.vary_backgrounds and self.backgrounds is None:
            raise ValueError("vary_backgrounds has nothing to vary without backgrounds: name some, or leave it out")
        _panoramas(self.backgrounds)

    @property
    def panoramas(self) -> tuple[str, ...]:
        """Files of the backgrounds."""
        return _panoramas(self.backgrounds)

    def scene(self, number: int) -> Scene:
        """One scene, looked at; another one in its place where there is nothing to ask.

        Raises:
            ValueError: where there is nothing to ask in a hundred scenes.
        """
        for attempt in range(_ATTEMPTS):
            scene = look(make_scene(seed_of(self.seed, number, attempt), available(self.unknown), self.panoramas))
            if ask(scene, 1, self.kinds, self.steps):
                return scene
        raise ValueError(
            f"there is nothing to ask of kind {', '.join(self.kinds)} in {_ATTEMPTS} scenes: name more kinds"
        )

    def picture(self, scene: Scene) -> Image.Image:
        """The panorama of a scene."""
        return self.labelled_picture(scene)[0]

    @property
    def label_fields(self) -> dict[str, int]:
        """What a scene knows of each direction, and how many classes each field has: 0 of `name` is nothing."""
        return {"name": 1 + len(SHAPES) + len(available(self.unknown)), "colour": len(COLOURS), "size": len(SIZES)}

    def labelled_picture(self, scene: Scene) -> tuple[Image.Image, LabelMaps]:
        """The panorama of a scene, and what it shows."""
        around = None
        if scene.panorama is not None:
            file = next(path for path in self.panoramas if Path(path).name == scene.panorama)
            around = _pixels(file, self.width)
            if self.vary_backgrounds:
                random = np.random.default_rng((scene.seed, 20262))
                around = varied(around, _pixels(str(random.choice(self.panoramas)), self.width), random)
        rendered = render_erp(scene, (self.width // 2, self.width), around)
        picture = Image.fromarray(rendered.colour.clamp(0, 1).mul(255).round().byte().numpy())
        ids = rendered.ids.numpy().astype(np.int64)  # negative where nothing is
        names = (*SHAPES, *available(self.unknown))
        of_things = {
            "name": [1 + names.index(thing.name) for thing in scene.things],
            "colour": [-1 if thing.colour is None else list(COLOURS).index(thing.colour) for thing in scene.things],
            "size": [list(SIZES).index(thing.size) for thing in scene.things],
        }
        nothing = {"name": 0, "colour": -1, "size": -1}
        classes = {name: np.array([*of_each, nothing[name]])[ids] for name, of_each in of_things.items()}
        return picture, LabelMaps(classes, ids, tuple(thing.place for thing in scene.things))

    def ask(self, scene: Scene) -> list[Question]:
        """Its questions."""
        return ask(scene, self.questions, self.kinds, self.steps)

    def tables_of(self, scene: Scene) -> list[Table]:
        """Its tables: of each the turns, what the user says and what is answered."""
        return tables(scene, self.tables, self.table_kinds, self.steps) if self.tables else []

    def row(self, scene: Scene, file_name: str = "") -> dict[str, Any]:
        """A row of `metadata.jsonl`: its questions, and its tables where it has some (`row_of`)."""
        questions = self.ask(scene)
        return row_of(scene, questions, file_name, self.tables_of(scene) if self.tables else None, self.steps)


SYNTHETIC = "synthetic://"


def parse_world(url: str) -> tuple[int, World]:
    """How many scenes of which world `synthetic://?scenes=N&seed=S&width=W&...` names; without `backgrounds` they
    are the samples, with `:name,name` after it some of them, with nothing after it there are none.

    Raises:
        ValueError: for an option that there is not, or a value that it cannot have.
    """
    given = dict(parse_qsl(url.removeprefix(SYNTHETIC).lstrip("?"), keep_blank_values=True, strict_parsing=True))
    known = ("scenes", *(each.name for each in fields(World)))
    check_option_names(given, known, f"a source {SYNTHETIC}?...")
    try:
        options: dict[str, Any] = {
            name: int(given[name]) for name in ("scenes", "seed", "width", "questions", "tables") if name in given
        }
        options |= {
            name: _truth(name, given[name]) for name in ("unknown", "steps", "vary_backgrounds") if name in given
        }
    except ValueError as error:
        raise ValueError(f"in {url!r}: {error}") from error
    scenes = options.pop("scenes", 0)
    if scenes < 1:
        raise ValueError(f"{url!r} must say how many scenes there are, such as {SYNTHETIC}?scenes=10000&seed=1")
    options |= {name: tuple(given[name].split(",")) for name in ("kinds", "table_kinds") if name in given}
    backgrounds = given.get("backgrounds", str(SAMPLES)) or None
    if backgrounds is not None and backgrounds.startswith(":"):
        backgrounds = f"{SAMPLES}{backgrounds}"
    return scenes, World(backgrounds=backgrounds, **options)


def _truth(name: str, value: str) -> bool:
    if value.lower() not in ("true", "1", "false", "0"):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value.lower() in ("true", "1")


@lru_cache(maxsize=8)
def _panoramas(named: str | None) -> tuple[str, ...]:
    """The panoramas of `FOLDER`, or of `FOLDER:name,name` those that are named, without their endings."""
    if named is None:
        return ()
    folder, colon, names = (named, "", "") if Path(named).is_dir() else named.rpartition(":")
    there = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    found = {file.stem: str(file) for file in there if file.suffix.lower() in ENDINGS}
    if not found:
        raise ValueError(f"there is no panorama ({', '.join(ENDINGS)}) in {folder or named!r}")
    if not colon:
        return tuple(found.values())
    if missing := [name for name in names.split(",") if name not in found]:
        raise ValueError(f"there are no panoramas {missing} in {folder!r}, only {sorted(found)}")
    return tuple(found[name] for name in names.split(","))


@lru_cache(maxsize=32)
def _pixels(file: str, width: int) -> torch.Tensor:
    """A panorama in about the size that is rendered, [3, H, W] in [0, 1]."""
    with Image.open(file) as image:
        image.draft("RGB", (width, width // 2))
        small = image.convert("RGB").resize((width, width // 2), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255


def varied(panorama: torch.Tensor, other: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Surroundings that nobody has seen, of two panoramas: each mirrored or not, in other colours and light, the
    second, turned, in patches of random size within the first.

    Args:
        panorama, other: [3, H, W] in [0, 1].
        random: decides everything.

    Returns:
        [3, H, W] in [0, 1], without a seam.
    """
    first, second = (_in_other_light(each, random) for each in (panorama, other))
    second = second.roll(int(random.integers(second.shape[-1])), -1)
    rows = 2 ** int(random.integers(2, 6))  # patches of 45 to 6 degrees
    noise = F.pad(torch.from_numpy(random.normal(size=(1, 1, rows, 2 * rows))).float(), (2, 2, 0, 0), "circular")
    columns = panorama.shape[-1] * noise.shape[-1] // (2 * rows)
    smooth = F.interpolate(noise, (panorama.shape[-2], columns), mode="bicubic", align_corners=False)[0, 0]
    aside = (columns - panorama.shape[-1]) // 2
    share = torch.sigmoid(8 * (smooth[:, aside : aside + panorama.shape[-1]] - float(random.uniform(0, 2))))
    return torch.lerp(first, second, share)


def _in_other_light(panorama: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """A panorama mirrored or not, its colours exchanged in a third of the cases, in another light."""
    if random.random() < 0.5:
        panorama = panorama.flip(-1)
    if random.random() < 1 / 3:
        panorama = panorama[torch.from_numpy(random.permutation(3))]
    gain = torch.from_numpy(random.uniform(0.75, 1.25, (3, 1, 1))).float()
    return (panorama.clamp(min=1e-3) ** float(random.uniform(0.7, 1.5)) * gain).clamp(0, 1)


def row_of(
    scene: Scene,
    questions: Sequence[Question],
    file_name: str,
    tables: Sequence[Table] | None = None,
    steps: bool = False,
) -> dict[str, Any]:
    """A row of `metadata.jsonl`: a conversation, and of each question its kind, options, key, places and what turning,
    mirroring and tilting do to its answer.

    Args:
        scene: they are about.
        questions: in the order they are asked.
        file_name: of its picture.
        tables: further conversations, the column `tables`; without it there is none.
        steps: whether answers carry their steps, and the column `steps` lists them.
    """
    turns: list[dict[str, str]] = []
    for place, question in enumerate(questions):
        options = [f"{'ABCDEFGH'[i]}. {text}" for i, text in enumerate(question.options)]
        words = "\n".join([question.words, *options, *[LETTER] * bool(options)])
        turns.append({"from": "human", "value": f"<image>\n{words}" if place == 0 else words})
        answer = f"{question.key}. {question.answer}" if options else question.answer
        thought = f"<think>{question.steps}</think>" if steps and question.steps else ""
        turns.append({"from": "gpt", "value": thought + answer})
    row = {
        "file_name": file_name,
        "conversations": turns,
        "questions": [question.words for question in questions],
        "kinds": [question.kind for question in questions],
        "options": [[["ABCDEFGH"[i], text] for i, text in enumerate(q.options)] or None for q in questions],
        "keys": [question.key for question in questions],
        "places": [None if q.places is None else [place.rounded() for place in q.places] for q in questions],
        "turns": [question.turns for question in questions],
        "mirrors": [question.mirrors for question in questions],
        "tilts": [question.tilts for question in questions],
        "scene": scene.seed,
    }
    if steps:
        row["steps"] = [question.steps for question in questions]
    if tables is not None:
        who = ("human", "gpt")
        row["tables"] = [
            [{"from": name, "value": words} for turn in table for name, words in zip(who, turn, strict=True)]
            for table in tables
        ]
    return row


def write_scenes(
    out: str | os.PathLike[str], world: World, scenes: int, processes: int | None = None, contact_sheet: bool = False
) -> Path:
    """Write scenes 0 to `scenes` - 1 into a folder; what is there already is kept, and the rest made.

    Args:
        out: the folder: pictures, `metadata.jsonl`, `scenes.jsonl` (everything there is to know, for other questions),
            `synthetic.json` (how it was made).
        world: what decides them.
        scenes: how many.
        processes: that render; as many as cores where it is not given.
        contact_sheet: whether `contact_sheet.jpg` shows the first ones with a question each.

    Raises:
        ValueError: for a folder of another world, or something else.
    """
    out = Path(out)
    if scenes < 1:
        raise ValueError(f"scenes must be at least 1, got {scenes}")
    done = _begin(out, world)
    warn_without_cutouts()
    with (out / METADATA).open("a", encoding="utf-8") as rows, (out / SCENES).open("a", encoding="utf-8") as all_scenes:
        progress = tqdm(_make(out, world, range(done, scenes), processes), total=scenes, initial=done, desc="scenes")
        for row, scene in progress:
            all_scenes.write(json.dumps(scene) + "\n")
            all_scenes.flush()
            rows.write(json.dumps(row) + "\n")
            rows.flush()
    if contact_sheet:
        _write_sheet(out)
    return out


def warn_without_cutouts() -> None:
    """Say that a world has solids only, where the font with pictures of things is missing and nobody left it out."""
    if not available() and not is_left_out():
        logger.warning("No font with pictures of things was found: there are solids only. See synthetic/cutouts.py.")


def _begin(out: Path, world: World) -> int:
    """How many scenes are done; lines that were cut off are dropped."""
    settings = {
        **asdict(world),
        "kinds": list(world.kinds),
        "table_kinds": list(world.table_kinds),
        "things": list(available(world.unknown)),
        "licence": LICENCE,
    }
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise ValueError(f"{str(out)!r} holds something else: choose a folder of its own")
    out.mkdir(parents=True, exist_ok=True)
    if (out / SETTINGS).is_file():
        # What a folder from before an option does not name is what the option does not change.
        then = {"tables": 0, "table_kinds": [], "steps": False, "vary_backgrounds": False} | json.loads(
            (out / SETTINGS).read_text("utf-8")
        )
        differ = [name for name, value in settings.items() if then.get(name) != value]
        changed = [f"{name} was {then.get(name)} and is {settings[name]}" for name in differ]
        if changed:
            raise ValueError(f"{str(out)!r} holds another world: {'; '.join(changed)}. Choose another folder")
    else:
        (out / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    lines = {name: _whole_lines(out / name) for name in (METADATA, SCENES)}
    done = min(map(len, lines.values()))
    for name, whole in lines.items():
        (out / name).write_text("".join(whole[:done]), encoding="utf-8")
    return done


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]


def _make(
    out: Path, world: World, numbers: range, processes: int | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    processes = processes or os.cpu_count() or 1
    if processes == 1:
        yield from (_write_one(out, world, number) for number in numbers)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in range(0, len(numbers), 256):  # bounded: a pool takes in all it is given
            some = numbers[start : start + 256]
            yield from pool.map(_write_one, [out] * len(some), [world] * len(some), some, chunksize=4)


def _write_one(out: Path, world: World, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    scene = world.scene(number)
    name = f"{number:06d}.jpg"
    unfinished = out / f".{name}"
    world.picture(scene).save(unfinished, "JPEG", quality=92, subsampling=0)
    os.replace(unfinished, out / name)
    return world.row(scene, name), {"file_name": name, **scene.to_dict()}


def _write_sheet(out: Path) -> None:
    """The first scenes, each with one of its questions."""
    rows = [json.loads(line) for line in _whole_lines(out / METADATA)[:_SHEET]]
    cell = (512, 256 + 30)
    sheet = Image.new("RGB", (3 * cell[0], -(-len(rows) // 3) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        corner = (place % 3 * cell[0], place // 3 * cell[1])
        with Image.open(out / row["file_name"]) as picture:
            sheet.paste(picture.resize((512, 256)), corner)
        turns = row["conversations"]
        if turns:
            which = 2 * (place % (len(turns) // 2))
            words = turns[which]["value"].removeprefix("<image>\n").replace("\n", " ")
            pen.text((corner[0] + 4, corner[1] + 258), f"{row['file_name']}: {words[:80]}", fill="black")
            pen.text((corner[0] + 4, corner[1] + 271), turns[which + 1]["value"][:90], fill="darkgreen")
    sheet.save(out / "contact_sheet.jpg", quality=90)
