"""The synthetic world, against rays that are marched step by step and answers that are worked out again."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.evaluation.items import Item
from panorama_vlm.evaluation.scores import judge
from panorama_vlm.geometry_panorama import View, ViewOptions
from panorama_vlm.image_processing_panorama import PanoramaImageProcessor
from panorama_vlm.places_panorama import bfov_iou, bfov_of_mask, read_places
from panorama_vlm.synthetic import cutouts, scenes
from panorama_vlm.synthetic.questions import CLOSED, KINDS, NUMBERS, SECTORS, ask
from panorama_vlm.synthetic.render import look, render_erp, render_views
from panorama_vlm.synthetic.scenes import COLOURS, EYES, SHAPES, Scene, Thing, make_scene
from panorama_vlm.synthetic.write import World, parse_world, row_of, varied, write_scenes
from panorama_vlm.tests.launching import ENVIRONMENT, SAMPLES
from PIL import Image

THINGS = cutouts.available()


def inside(thing, points):
    """Which points [..., 3] lie in a solid, by the inequalities that define its shape; float64."""
    a = math.radians(thing.turn)
    half = thing.extent / 2
    x, y, z = np.moveaxis(points - np.array(thing.position), -1, 0)
    x, z = x * math.cos(a) - z * math.sin(a), x * math.sin(a) + z * math.cos(a)
    around = np.hypot(x, z)
    return {
        "ball": lambda: x**2 + y**2 + z**2 <= half**2,
        "cube": lambda: np.maximum(np.maximum(abs(x), abs(z)), abs(y + 0.1 * half)) <= 0.9 * half,
        "diamond": lambda: abs(x) + abs(y) + abs(z) <= half,
        "cylinder": lambda: (around <= 0.75 * half) & (abs(y) <= half),
        "cone": lambda: (around <= 0.75 * half * (half - y) / (2 * half)) & (abs(y) <= half),
    }[thing.name]()


def marched(things, rays):
    """Ids and depths by looking at points 4 mm apart along every ray, nearest first."""
    ids, depth = np.full(len(rays), -1), np.full(len(rays), np.inf)
    for number, thing in enumerate(things):
        near = np.flatnonzero(
            rays @ np.array(thing.position) / thing.distance
            > math.cos(math.asin(min(0.999, 0.9 * thing.extent / thing.distance)))
            if thing.distance > 0.9 * thing.extent
            else np.ones(len(rays), bool)
        )
        steps = np.arange(max(0.0, thing.distance - thing.extent), thing.distance + thing.extent, 0.004)
        for some in np.array_split(near, max(1, len(near) // 500)):
            hit = inside(thing, rays[some][:, None] * steps[:, None])
            first = np.where(hit.any(1), steps[hit.argmax(1)], np.inf)
            closer = first < depth[some]
            ids[some[closer]], depth[some[closer]] = number, first[closer]
    return ids, depth


def at(name, yaw, pitch, distance, size="medium", colour="red", turn=20.0):
    a, b = math.radians(yaw), math.radians(pitch)
    position = (distance * math.cos(b) * math.sin(a), distance * math.sin(b), distance * math.cos(b) * math.cos(a))
    return Thing(name, colour, size, position, turn)


# The renderer


@pytest.mark.parametrize("name", SHAPES)
def test_what_rays_see_is_what_marching_along_them_finds(name):
    """Across the seam, near both poles, one behind another."""
    things = (
        at(name, 179, -10, 2.5),
        at(name, 40, 82, 2.2, turn=50),
        at(name, -70, -65, 1.3, "small"),
        at(name, 0, 5, 3.0),
        at(name, 8, 8, 4.6, "large", "blue", 70),
    )
    size = (128, 256)
    picture = render_erp(Scene(0, things), size)
    rays = View("erp").rays(size).reshape(-1, 3)
    ids, depth = marched(things, rays)
    ours = picture.ids.reshape(-1).numpy()
    apart = ours != ids
    assert apart.mean() < 5e-4  # rays that graze an edge between two steps
    seen = (ids >= 0) & ~apart
    assert seen.sum() > 1000 and set(ids[seen]) == {0, 1, 2, 3, 4}
    assert np.abs(picture.depth.reshape(-1).numpy()[seen] - depth[seen]).max() < 0.0045


@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (180, 20), (-179.5, -40), (60, 80), (10, -88)])
def test_the_outline_of_a_ball_is_right_to_half_a_pixel(yaw, pitch):
    """A ball of radius r at distance d is a cap of asin(r / d)."""
    thing = at("ball", yaw, pitch, 1.2, "small")  # above the floor
    height, width = 512, 1024
    mask = render_erp(Scene(0, (thing,)), (height, width)).ids.numpy() == 0
    rays = View("erp").rays((height, width))
    middle = np.array(thing.position) / thing.distance
    angle = np.degrees(np.arccos(np.clip(rays @ middle, -1, 1)))
    radius = math.degrees(math.asin(thing.extent / 2 / thing.distance))
    half = 180 / height / 2
    assert mask[angle < radius - half].all() and not mask[angle > radius + half].any()
    place = bfov_of_mask(mask)
    if abs(pitch) + radius < 90:
        assert place.edges == pytest.approx((pitch - radius, pitch + radius), abs=2 * half)
        exact = 2 * math.degrees(math.asin(math.sin(math.radians(radius)) / math.cos(math.radians(pitch))))
        assert place.x_fov == pytest.approx(exact, abs=4 * half)


def test_a_cutout_stands_upright_and_faces_the_observer():
    if not THINGS:
        pytest.skip("the font with pictures of things is not installed")
    extent = scenes.SIZES["medium"]
    for yaw in (0.0, 135.0, 180.0):
        a = math.radians(yaw)
        thing = Thing("house", None, "medium", (3 * math.sin(a), extent / 2 - EYES, 3 * math.cos(a)))
        mask = render_erp(Scene(0, (thing,)), (512, 1024)).ids.numpy() == 0
        rays = View("erp").rays((512, 1024))
        alpha = cutouts.picture("house")[..., 3] > 127
        rows, columns = np.nonzero(alpha)
        ahead = rays @ np.array([math.sin(a), 0, math.cos(a)])
        with np.errstate(divide="ignore", invalid="ignore"):
            across = (rays @ np.array([math.cos(a), 0, -math.sin(a)])) * 3 / ahead
            up = rays[..., 1] * 3 / ahead + EYES
        box = (ahead > 0) & (up >= 0) & (up <= extent) & (abs(across) <= extent / 2)
        assert not mask[~box].any()
        filled = mask.sum() / box.sum()
        assert filled == pytest.approx(alpha.mean(), abs=0.03)
        assert up[mask].max() == pytest.approx(extent * (1 - rows.min() / 128), abs=0.03)
        assert across[mask].min() == pytest.approx(extent * (columns.min() / 128 - 0.5), abs=0.03)


@pytest.mark.parametrize("strategy", ["anyres_e2p", "cubemap"])
def test_views_are_those_that_the_image_processor_cuts(strategy):
    """The figure of the docs: at least 30 dB for every view."""
    scene = look(make_scene(7, THINGS))
    processor = PanoramaImageProcessor(
        image_size=128, view_strategy=strategy, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    plan = ViewOptions(strategy).plan
    erp = render_erp(scene, (1024, 2048)).colour
    image = Image.fromarray(erp.clamp(0, 1).mul(255).round().byte().numpy())
    cut = processor(image, return_tensors="pt")["pixel_values"][0].permute(0, 2, 3, 1)
    ours = render_views(scene, plan, 128).colour.clamp(0, 1)
    errors = ((cut - ours) ** 2).mean((1, 2, 3))
    assert (-10 * torch.log10(errors)).min() > 30


def test_a_gpu_sees_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    scene = look(make_scene(3, THINGS))
    here, there = (render_erp(scene, (128, 256), device=device) for device in ("cpu", "cuda"))
    assert (here.colour - there.colour.cpu()).abs().max() <= 1.5 / 255
    assert (here.ids == there.ids.cpu()).float().mean() > 0.9999


def test_a_panorama_around_is_turned_by_its_heading():
    file = SAMPLES / "park.jpg"
    image = Image.open(file).convert("RGB").resize((512, 256))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    scene = Scene(0, (), panorama="park.jpg", heading=90.0)
    seen = render_erp(scene, (256, 512), pixels).colour
    turned = torch.roll(pixels, -128, -1).permute(1, 2, 0)  # what was at the right is in front
    assert (seen - turned).abs().mean() < 2e-3
    with pytest.raises(ValueError, match="give its pixels"):
        render_erp(scene, (16, 32))


@pytest.mark.parametrize("heading", [0.0, 90.0])
def test_things_are_lit_from_where_a_panorama_is_bright(heading):
    """A panorama that is bright at its right, seen by who faces the front, or has turned to the right."""
    around = torch.full((3, 64, 128), 0.3)
    around[:, 8:24, 88:104] = 1.0
    scene = Scene(0, (at("ball", 0, 0, 1.5, "small"),), panorama="x", heading=heading)
    picture = render_erp(scene, (128, 256), around)
    seen = picture.colour[..., 0].where(picture.ids == 0, torch.nan)
    left, right = seen[:, :128].nanmean(), seen[:, 128:].nanmean()
    assert (right > left + 0.03) == (heading == 0.0) and (abs(right - left) < 0.02) == (heading == 90.0)


# Scenes


def test_a_scene_follows_from_its_seed_and_survives_a_file():
    for seed in range(20):
        scene = look(make_scene(seed, THINGS, ["a.jpg", "b.jpg"]))
        assert scene == look(make_scene(seed, THINGS, ["a.jpg", "b.jpg"]))
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene
        assert 3 <= len(scene.things) <= 10
    assert make_scene(1) != make_scene(2)


def test_scenes_have_what_is_hard():
    made = [look(make_scene(seed, THINGS, ["a.jpg"])) for seed in range(150)]
    things = [thing for scene in made for thing in scene.things]
    assert 0.4 < np.mean([scene.panorama is not None for scene in made]) < 0.6
    assert sum(abs(t.pitch) > 60 for t in things) > 30 and min(t.pitch for t in things) < -50
    assert sum(0.02 < t.seen < 0.9 for t in things) > 30  # partly hidden
    assert sum(t.place is not None and abs(abs(t.place.yaw) - 180) < t.place.x_fov / 2 for t in things) > 20  # seam
    assert not {t.name for t in things} & set(cutouts.UNKNOWN)
    if THINGS:
        assert len(THINGS) >= 60 and len({t.name for t in things if t.colour is None}) > 50
        assert len({cutouts.picture(name).tobytes() for name in THINGS}) == len(THINGS)


def test_what_is_seen_of_a_thing_is_what_a_finer_picture_shows():
    for seed in range(8):
        scene = look(make_scene(seed, THINGS))
        size = (512, 1024)
        ids = render_erp(scene, size).ids.numpy()
        weights = np.cos(np.radians(90 - (np.arange(512) + 0.5) * 180 / 512))[:, None] * np.ones(size)
        for number, thing in enumerate(scene.things):
            alone = render_erp(replace(scene, things=(thing,)), size).ids.numpy() == 0
            share = weights[ids == number].sum() / max(weights[alone].sum(), 1e-9)
            assert thing.seen == pytest.approx(share, abs=0.06)
            if thing.place is not None and (ids == number).sum() > 200:
                assert bfov_iou(thing.place, bfov_of_mask(ids == number)) > 0.85


# Questions: an oracle that knows the scene and reads the words


class Oracle:
    """Answers from a scene of `scenes.jsonl`, worked out anew from positions, colours and places."""

    def __init__(self, values):
        self.things = [t for t in values["things"] if t["place"] is not None and t["seen"] >= 0.02]
        for thing in self.things:
            x, y, z = thing["position"]
            thing["yaw"] = math.degrees(math.atan2(x, z))
            thing["pitch"] = math.degrees(math.atan2(y, math.hypot(x, z)))
            thing["far"] = math.sqrt(x * x + y * y + z * z)

    def find(self, words):
        """The things that words name."""
        wanted = words.split()
        names = [{t["name"], t["colour"], t["size"], "solid" if t["colour"] else None} for t in self.things]
        return [t for t, own in zip(self.things, names, strict=True) if all(word in own for word in wanted)]

    def one(self, words):
        (thing,) = self.find(words)
        return thing

    def full(self, thing):
        return f"{thing['colour']} {thing['name']}" if thing["colour"] else thing["name"]

    def sector(self, yaw):
        return SECTORS[int(((yaw + 22.5) % 360) // 45)]

    def answer(self, kind, words, options):
        found = PATTERNS[kind].search(words)
        assert found, (kind, words)
        return getattr(self, kind)(
            *[group for group in found.groups() if group is not None], **({"options": options} if options else {})
        )

    def existence(self, words):
        return "yes" if self.find(words) else "no"

    def colour(self, words):
        return self.one(words)["colour"]

    def shape(self, words):
        return self.one(words)["name"]

    def size(self, words):
        return self.one(words)["size"]

    def count(self, words):
        return NUMBERS[len(self.find(words.removesuffix("s")))]

    def direction(self, words):
        return self.sector(self.one(words)["yaw"])

    def what_is_in_direction(self, words):
        name = {"in front": "front", "behind you": "back"}.get(words, words.removeprefix("at the "))
        (thing,) = [t for t in self.things if self.sector(t["yaw"]) == name]
        return self.full(thing)

    def order(self, start, first, second):
        turns = [(self.one(words)["yaw"] - self.one(start)["yaw"]) % 360 for words in (first, second)]
        return first if turns[0] < turns[1] else second

    def after_turning(self, turn, words):
        heading = {"right by 90": 90, "left by 90": -90, "right by 135": 135, "left by 135": -135}.get(turn, 180)
        return self.sector(self.one(words)["yaw"] - heading)

    def facing(self, faced, other):
        turn = (self.one(other)["yaw"] - self.one(faced)["yaw"] + 180) % 360 - 180
        side = "right" if turn > 0 else "left"
        return side if 15 < abs(turn) < 90 else f"back-{side}" if abs(turn) < 150 else "opposite"

    def nearest_of_four(self, _, options):
        return min((text for _, text in options), key=lambda words: self.one(words)["far"])

    def higher_or_lower(self, first, second):
        return "higher" if self.one(first)["pitch"] > self.one(second)["pitch"] else "lower"

    def relation_3d(self, first, way, second):
        axis, words = {
            "further": (0, ("right", "left")),
            "above": (1, ("above", "below")),
            "lie": (2, ("ahead", "behind")),
        }[way]
        return words[self.one(first)["position"][axis] < self.one(second)["position"][axis]]

    def adjacent_across_seam(self, words, options):
        start = self.one(words)["yaw"]
        return min((text for _, text in options), key=lambda each: (self.one(each)["yaw"] - start) % 360)

    def one_or_two_at_seam(self, _):
        edge = [t for t in self.things if abs(abs(t["place"][0]) - 180) < t["place"][2] / 2]
        return "one" if edge else "two"

    def shape_at_pole(self, where):
        steep = [
            t
            for t in self.things
            if t["colour"] and t["pitch"] * (1 if where in ("overhead", "above you") else -1) > 60
        ]
        (thing,) = steep
        return thing["name"]

    def place(self, thing):
        return [
            round(value) if index else (round(value) + 180) % 360 - 180 for index, value in enumerate(thing["place"])
        ]

    def grounding(self, words):
        return str(self.place(self.one(words)))

    def what_is_at_place(self, words):
        return self.full(
            min(
                self.things,
                key=lambda t: sum(abs(a - b) for a, b in zip(self.place(t), json.loads(words), strict=True)),
            )
        )

    def grounding_all(self, words):
        return str([self.place(t) for t in sorted(self.find(words.removesuffix("s")), key=lambda t: t["yaw"])])

    def caption_around(self, _):
        things = sorted((t for t in self.things if abs(t["pitch"]) < 60), key=lambda t: (t["yaw"] + 22.5) % 360)
        return "; ".join(f"{self.sector(t['yaw'])}: {self.full(t)}" for t in things) + "."

    def caption_direction(self, where):
        middle = {"in front": 0, "to the right": 90, "at the back": 180, "to the left": -90}[where]
        turns = {
            self.full(t) + str(t["position"]): ((t["yaw"] - middle + 180) % 360 - 180, t)
            for t in self.things
            if abs(t["pitch"]) < 60
        }
        return (
            ", ".join(self.full(t) for turn, t in sorted(turns.values(), key=lambda each: each[0]) if abs(turn) < 45)
            + "."
        )


PATTERNS = {
    "existence": re.compile(r"(?:there|see|show) an? (.*?)(?: around you)?\?"),
    "colour": re.compile(r"(?:is|does) the (.*?)(?: have)?\?"),
    "shape": re.compile(r"(?:is|has) the (.*)\?"),
    "size": re.compile(r"(?:is|Is) the (.*?)(?::| small, medium)"),
    "count": re.compile(r"(?:How many|Count the) (.*?) (?:are|can|around)"),
    "direction": re.compile(r"(?:is|see) the (.*)\?"),
    "what_is_in_direction": re.compile(r"(in front|behind you|at the [a-z-]+)\?"),
    "order": re.compile(r"face the (.*) and turn .* first, the (.*) or the (.*)\?"),
    "after_turning": re.compile(r"You turn (?:((?:right|left) by \d+)|(around)).*Where is the (.*) now"),
    "facing": re.compile(r"face the (.*)\. Is the (.*) right, back-right"),
    "nearest_of_four": re.compile(r"(nearest|closest)"),
    "higher_or_lower": re.compile(r"Does the (.*) appear .* than the (.*)\?"),
    "relation_3d": re.compile(
        r"(?:is|Is|does) the (.*?) (?:is )?(further|above|lie)"
        r".*?(?:than|below|ahead of) the (.*?)(?: or behind it)?, in metres"
    ),
    "adjacent_across_seam": re.compile(r"next to the (.*) across"),
    "one_or_two_at_seam": re.compile(r"(one thing or two)"),
    "shape_at_pole": re.compile(r"(overhead|above you|underfoot|below you)"),
    "grounding": re.compile(r"(?:is|of) the (.*?)(?:\?| as)"),
    "what_is_at_place": re.compile(r"(\[.*\])\?"),
    "grounding_all": re.compile(r"of all (.*?) from left"),
    "caption_around": re.compile(r"(around)"),
    "caption_direction": re.compile(r"put (in front|to the right|at the back|to the left) of you"),
}


def test_an_oracle_that_reads_the_scenes_answers_everything_right():
    right, wrong = Counter(), []
    for seed in range(250):
        scene = look(make_scene(10_000 + seed, THINGS))
        questions = ask(scene, 99)
        row = row_of(scene, questions, "x.jpg")
        oracle = Oracle(json.loads(json.dumps(scene.to_dict())))
        for words, kind, options, answer in zip(
            row["questions"], row["kinds"], row["options"], row["conversations"][1::2], strict=True
        ):
            given = oracle.answer(kind, words, options)
            if options:
                given = next(f"{key}. {text}" for key, text in options if text == given)
            right[kind] += given == answer["value"]
            if given != answer["value"]:
                wrong.append((scene.seed, kind, words, answer["value"], given))
    assert not wrong, wrong[:5]
    assert set(right) == set(KINDS) and min(right.values()) >= 10


def test_a_count_may_be_answered_in_digits():
    for number, word in enumerate(NUMBERS):
        assert judge(Item("a", "x.jpg", "How many?", [word], kind="count"), str(number))["right"]


def test_places_of_answers_are_read_and_given_beside_them():
    for seed in range(40):
        scene = look(make_scene(seed, THINGS))
        row = row_of(scene, ask(scene, 99, ["grounding", "grounding_all"]), "x.jpg")
        for answer, places in zip(row["conversations"][1::2], row["places"], strict=True):
            assert [named.place.rounded() for named in read_places(answer["value"])] == places


def questions_of(seeds):
    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        scene = look(make_scene(seed, THINGS))
        for question in ask(scene, 99, CLOSED):
            answer = question.answer
            named = re.search(r"first, the (.*) or the (.*)\?", question.words)
            if question.options:
                answer = question.key
            elif named and question.kind == "order":
                answer = str(named.groups().index(answer))
            elif question.kind == "relation_3d":  # two answers to choose from, whatever the axis
                answer = str(answer in ("left", "below", "behind"))
            words = " ".join([question.words, *question.options])
            found.append((question.kind, words, answer))
    return found


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_reader_of_the_questions_alone_knows_no_more_than_chance(capsys):
    """Naive Bayes on words and pairs of them, on at least 2,500 questions a kind."""
    found, start = defaultdict(list), 0
    with ProcessPoolExecutor() as pool:
        while start < 120_000 and (not found or min(len(found[kind]) for kind in CLOSED) < 2500):
            for some in pool.map(questions_of, [range(s, s + 100) for s in range(start, start + 4000, 100)]):
                for kind, words, answer in some:
                    if len(found[kind]) < 4000:
                        found[kind].append((words, answer))
            start += 4000
    with capsys.disabled():
        for kind in CLOSED:
            share, chance, count = reader(found[kind])
            print(f"{kind:24} {count:6} questions, chance {chance:.3f}, reader {share:.3f}")
            assert count >= 2500 and share < chance + 0.03, kind


def reader(rows):
    """Share of right answers, of chance, and how many: each is asked of a reader that the other half taught."""
    tokens = [words.lower().replace("?", " ?").split() for words, _ in rows]
    bags = [set(each) | {f"{a} {b}" for a, b in zip(each, each[1:], strict=False)} for each in tokens]
    answers = sorted({answer for _, answer in rows})
    half, right = len(rows) // 2, 0
    for taught, asked in ((range(half), range(half, len(rows))), (range(half, len(rows)), range(half))):
        counts = {answer: Counter() for answer in answers}
        totals = Counter(rows[place][1] for place in taught)
        for place in taught:
            counts[rows[place][1]].update(bags[place])
        for place in asked:
            scores = {
                each: math.log(totals[each] + 1e-9)
                + sum(math.log((counts[each][word] + 1) / (totals[each] + 2)) for word in bags[place])
                for each in answers
            }
            right += max(scores, key=scores.get) == rows[place][1]
    return right / len(rows), 1 / len(answers), len(rows)


# Folders


def test_a_folder_that_was_stopped_is_gone_on_with_to_the_byte(tmp_path):
    world = World(seed=4, width=128, questions=4, backgrounds=str(SAMPLES))
    whole = write_scenes(tmp_path / "whole", world, 6, processes=1)
    write_scenes(tmp_path / "part", world, 3, processes=1)
    with (tmp_path / "part/scenes.jsonl").open("a") as lines:
        lines.write('{"seed": 1, "thi')  # killed while writing
    write_scenes(tmp_path / "part", world, 6, processes=1)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()} == files
    assert len(files) == 6 + 3
    with pytest.raises(ValueError, match="another world: seed was 4 and is 5"):
        write_scenes(whole, replace(world, seed=5), 6)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write_scenes(tmp_path / "other", world, 1)


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_and_the_trainer_reads_what_it_left(tmp_path):
    command = [
        sys.executable,
        "-m",
        "panorama_vlm.synthetic",
        str(tmp_path / "a"),
        "--scenes",
        "24",
        "--size",
        "256x128",
    ]
    command += ["--seed", "9", "--contact-sheet"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True)
    while not (tmp_path / "a/metadata.jsonl").is_file() or not (tmp_path / "a/metadata.jsonl").read_text():
        time.sleep(0.05)
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kinds" in json.loads((tmp_path / "a/metadata.jsonl").read_text().splitlines()[23])
    assert (tmp_path / "a/contact_sheet.jpg").is_file()
    write_scenes(tmp_path / "b", World(seed=9, width=256, backgrounds=str(SAMPLES)), 24)
    assert (tmp_path / "a/metadata.jsonl").read_bytes() == (tmp_path / "b/metadata.jsonl").read_bytes()
    url = "synthetic://?scenes=24&seed=9&width=256"
    for stage in ("vision", "finetune"):
        (written, _), (drawn, _) = (
            open_data([DataSource(path)], stage=stage, seed=0) for path in (str(tmp_path / "a"), url)
        )
        assert len(written) == len(drawn) == 24
        a, b = written[7], drawn[7]
        if stage == "finetune":
            text = [[p.get("text") for m in each["messages"] for p in m["content"]] for each in (a, b)]
            assert text[0] == text[1]
        else:
            pictures = [np.asarray(Image.open(a["image"])).astype(int), np.asarray(b["image"]).astype(int)]
            assert np.abs(pictures[0] - pictures[1]).mean() < 3  # JPEG
    shutil.rmtree(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "512x512"], "--size must be WIDTHxHEIGHT"),
        (["--scenes", "0"], "scenes must be at least 1"),
        (["--kinds", "colours"], "unknown option 'colours' of the kinds of questions, did you mean 'colour'"),
        (["--backgrounds", "nowhere"], "there is no panorama"),
        (["--questions", "0"], "questions must be at least 1"),
    ],
)
def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path, options, words, capsys):
    from panorama_vlm.synthetic.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "out"), *options])
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("synthetic://?seed=1", "must say how many scenes"),
        ("synthetic://?scenes=5&sede=1", "did you mean 'seed'"),
        ("synthetic://?scenes=five", "invalid literal"),
        ("synthetic://?scenes=5&width=31", "width must be even"),
    ],
)
def test_a_source_of_scenes_says_what_is_wrong(path, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        open_data([DataSource(path)], stage="vision", seed=0)


def test_without_the_font_there_are_solids_only_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cutouts, "find_font", lambda: None)
    write_scenes(tmp_path / "a", World(seed=1, width=64), 2, processes=1)
    assert "there are solids only" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "a/scenes.jsonl").read_text().splitlines()]
    assert {thing["name"] for line in lines for thing in line["things"]} <= set(SHAPES)
    assert {thing["colour"] for line in lines for thing in line["things"]} <= set(COLOURS)
    with pytest.raises(ValueError, match="is not installed"):
        cutouts.picture.__wrapped__("dog")
    assert Path(tmp_path / "a/000000.jpg").is_file()


def test_a_font_that_is_left_out_leaves_solids_and_no_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv(cutouts.VARIABLE, raising=False)
    before = cutouts.available()
    monkeypatch.setenv(cutouts.VARIABLE, "")
    write_scenes(tmp_path / "a", World(seed=1, width=64), 2, processes=1)
    assert "solids only" not in caplog.text
    assert json.loads((tmp_path / "a/synthetic.json").read_text())["things"] == []
    monkeypatch.setenv(cutouts.VARIABLE, "missing.ttf")
    with pytest.raises(ValueError, match=r"missing\.ttf.* is no file"):
        cutouts.available()
    monkeypatch.delenv(cutouts.VARIABLE)
    assert cutouts.available() == before  # nothing of it is remembered


def test_varied_surroundings_differ_from_scene_to_scene_and_nothing_else_does():
    plain = World(seed=6, width=256, backgrounds=f"{SAMPLES}:park,lab")
    other = replace(plain, vary_backgrounds=True)
    scenes = [scene for scene in map(plain.scene, range(12)) if scene.panorama]
    assert len(scenes) >= 3
    for scene in scenes:
        (before, labels), (after, again) = plain.labelled_picture(scene), other.labelled_picture(scene)
        assert (labels.things == again.things).all() and other.row(scene) == plain.row(scene)
        assert np.abs(np.asarray(before, float) - np.asarray(after, float))[labels.things < 0].mean() > 5
        assert (np.asarray(other.picture(scene)) == np.asarray(after)).all()
    drawn = next(scene for scene in map(plain.scene, range(12)) if not scene.panorama)
    assert (np.asarray(plain.picture(drawn)) == np.asarray(other.picture(drawn))).all()
    assert parse_world("synthetic://?scenes=1&vary_backgrounds=true")[1].vary_backgrounds
    with pytest.raises(ValueError, match="nothing to vary without backgrounds"):
        World(vary_backgrounds=True)


def test_a_folder_from_before_an_option_is_gone_on_with(tmp_path):
    write_scenes(tmp_path, World(seed=3, width=64), 1, processes=1)
    settings = json.loads((tmp_path / "synthetic.json").read_text())
    for later in ("vary_backgrounds", "tables", "steps"):
        del settings[later]
    (tmp_path / "synthetic.json").write_text(json.dumps(settings))
    write_scenes(tmp_path, World(seed=3, width=64), 2, processes=1)
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="steps was False and is True"):
        write_scenes(tmp_path, World(seed=3, width=64, steps=True), 3, processes=1)


def test_varied_surroundings_have_no_seam():
    column = torch.linspace(0, 2 * math.pi, 257)[:-1]
    smooth = (0.5 + 0.4 * torch.cos(column)).expand(3, 128, 256)
    steps = []
    for seed in range(200):
        mixed = varied(smooth, 1 - smooth, np.random.default_rng(seed))
        assert mixed.shape == smooth.shape and 0 <= mixed.min() and mixed.max() <= 1
        steps.append((mixed - mixed.roll(1, -1)).abs().mean((0, 1)))  # from each column to the one before it
    steps = torch.stack(steps).mean(0)
    assert 0.8 * steps.mean() < steps[0] < 1.2 * steps.mean()
