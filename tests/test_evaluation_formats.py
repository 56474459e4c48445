"""Questions are read as the field's data sets hold them; what is none says why, and nothing raises."""

import base64
import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from panorama_vlm.evaluation.formats import read_items, rotate_options, write_predictions
from panorama_vlm.evaluation.items import Item
from panorama_vlm.evaluation.prompts import ask_text
from panorama_vlm.places_panorama import BFoV, bfov_of_mask

PARK = Path(__file__).resolve().parent.parent / "samples" / "park.jpg"  # 512 x 256


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set's folder with two images."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("park.jpg", "lab.jpg"):
        shutil.copy(PARK.parent / name, data / name)
    return data


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def table(path: Path, rows: list[dict]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def drawn(x1: int, x2: int, y1: int, y2: int) -> BFoV:
    """The place of a box of pixels in the park, by filling them in (columns from x1 around to x2)."""
    mask = np.zeros((256, 512), bool)
    columns = np.arange(x1, x2 if x2 > x1 else x2 + 512) % 512
    mask[y1:y2, columns] = True
    return bfov_of_mask(mask)


def reasons(read) -> list[str]:
    return [each["reason"] for each in read.dropped]


PANOSPACE = {
    "item_id": "a1",
    "task_id": "relative_direction",
    "ability_group": "reference_frame",
    "diagnostic_slices": ["seam"],
    "image_path": "park.jpg",
    "question": "Where is the tree?",
    "options": [{"key": "A", "text": "Left"}, {"key": "B", "text": "Right"}],
    "answer": "B",
    "answer_text": "Right",
}
GOOD = {  # a row of each format that is read from lines of JSON or tables
    "panospace": PANOSPACE,
    "hbench": {"image": "park.jpg", "question": "Find it.", "target_yaw": [10, 30], "target_pitch": [-5, 5]},
    "eagle": {
        "image": "park.jpg",
        "question": "Where is it?",
        "azimuth_degrees": 350,
        "elevation_degrees": -10,
        "bbox_width_degrees": 20,
        "bbox_height_degrees": 8,
    },
    "panoenv": {
        "image": "park.jpg",
        "conversations": [{"from": "human", "value": "Is it near?"}, {"from": "gpt", "value": "<Answer>No</Answer>"}],
        "question_type": "true_false",
        "expected_answer": "No",
    },
    "quic360": {"url": "https://a.org/p/park.jpg?raw=1", "query": "ground", "annotation": "Grass."},
    "360bench": {"index": 1, "image": "park.jpg", "question": "What?", "A": "x", "B": "y", "C": "", "answer": "B"},
    "omnicot": {"file_name": "park.jpg", "question": "Why?", "answer": "So.", "type": "t", "subtype": "s", "cot": "1."},
    "panorama": {"file_name": "park.jpg", "question": "What?", "answer": "A park."},
    "osr": {"image": "park.jpg", "question": "How many?", "answer": "2", "skills_tested": "object_counting"},
}


@pytest.mark.parametrize("format", GOOD)
def test_a_format_is_known_by_its_fields(folder, format):
    read = read_items(jsonl(folder / "data.jsonl", [GOOD[format]]))
    assert (read.format, read.dropped, len(read.items)) == (format, [], 1)
    assert os.path.samefile(read.items[0].image, folder / "park.jpg")
    assert read.items[0].panorama == "park.jpg"
    assert read.items == read_items(str(folder / "data.jsonl"), format=format).items


def test_panospace(folder):
    grounding = {**PANOSPACE, "options": None, "answer_text": ""}
    rows = [
        PANOSPACE,
        {**grounding, "item_id": "a2", "task_id": "grounding", "answer": [170, -5, 40, 20]},
        {**grounding, "item_id": "a3", "task_id": "grounding", "answer": "[190, -5, 40.5, 20]"},
        {**grounding, "item_id": "a4", "task_id": "grounding", "answer": "yaw=1 pitch=2 x_fov=3 y_fov=4"},
        {**grounding, "item_id": "a5", "answer": "north", "answer_text": "to the north"},
    ]
    read = read_items(jsonl(folder / "data.jsonl", rows))
    assert read.dropped == []
    first, *placed, words = read.items
    assert (first.id, first.kind, first.group) == ("a1", "relative_direction", "reference_frame")
    assert (first.options, first.key, first.references) == ([("A", "Left"), ("B", "Right")], "B", ["Right"])
    assert first.more == {"diagnostic_slices": ["seam"]} and first.places is None
    assert [item.places for item in placed] == [[(170, -5, 40, 20)], [(-170, -5, 40.5, 20)], [(1, 2, 3, 4)]]
    assert placed[0].references == ["[170, -5, 40, 20]"]
    assert words.references == ["north", "to the north"] and words.places is None


def test_predictions_are_written_by_item(tmp_path):
    write_predictions(tmp_path / "out.jsonl", {"a1": "B", "a2": 'two\nlines "and" ö'})
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [{"item_id": "a1", "prediction": "B"}, {"item_id": "a2", "prediction": 'two\nlines "and" ö'}]


def test_osr_scenes_are_walked_and_their_variants_asked_once(tmp_path):
    turns = [
        {"turn_id": 1, "question": "How many chairs?", "answer": 9, "skills_tested": "object_counting"},
        {"turn_id": 4, "question": "A map?", "answer": {"tv": [[1, 2]]}, "skills_tested": ["map", "layout"]},
    ]
    added = {"turn_id": 5, "question": "How many cats?", "answer": "0", "skills_tested": "object_counting"}
    for scene in ("room1", "room2"):
        (tmp_path / scene).mkdir()
        shutil.copy(PARK, tmp_path / scene / "rgb.png")
        (tmp_path / scene / "qa.json").write_text(json.dumps({"image_id": "x", "conversation": turns}))
        (tmp_path / scene / "cognitive_map.json").write_text(json.dumps({"tv": [1]}))
    (tmp_path / "room1" / "qa_with_negative.json").write_text(json.dumps({"conversation": [turns[0], added]}))
    (tmp_path / "room2" / "torn.json").write_text('{"conversation": [')
    read = read_items(str(tmp_path))
    assert read.format == "osr"
    assert [(item.panorama, item.question) for item in read.items] == [
        ("room1/rgb.png", "How many chairs?"),
        ("room1/rgb.png", "A map?"),
        ("room1/rgb.png", "How many cats?"),
        ("room2/rgb.png", "How many chairs?"),
        ("room2/rgb.png", "A map?"),
    ]
    assert (read.items[0].references, read.items[0].kind) == (["9"], "object_counting")
    assert (json.loads(read.items[1].references[0]), read.items[1].kind) == ({"tv": [[1, 2]]}, "map, layout")
    assert [(each["file"], each["row"]) for each in read.dropped] == [
        ("room1/qa_with_negative.json", 1),
        ("room2/torn.json", 0),
    ]
    assert "duplicate of 'room1/qa.json:1'" in reasons(read)[0] and "not JSON" in reasons(read)[1]
    alone = read_items(str(tmp_path / "room1" / "qa_with_negative.json"))
    assert [item.question for item in alone.items] == ["How many chairs?", "How many cats?"] and not alone.dropped


def test_360bench_boxes_are_places(folder):
    row = {"index": 1, "image": "park.jpg", "question": "Where?", "category": "FP", "l2-category": "Os", "answer": "a"}
    rows = [
        {**row, "bbox_2d": "[256, 64, 384, 128]"},
        {**row, "index": 2, "bbox_2d": "[480, 100, 32, 140]"},  # across the seam
        {**row, "index": 3, "bbox_2d": "[480, 100, 600, 140]"},
        {**row, "index": 4, "bbox_2d": "[480, 100, nan, 140]"},
    ]
    read = read_items(table(folder / "data.tsv", rows), format="360bench")
    middle, seam = read.items
    assert middle.places == [(45, 22.5, 90, 45)] and seam.places == [(-180, 90 - 120 / 256 * 180, 45, 28.125)]
    np.testing.assert_allclose(middle.places, [drawn(256, 384, 64, 128)])
    np.testing.assert_allclose(seam.places, [drawn(480, 32, 100, 140)])
    assert (middle.kind, middle.group) == ("Os", "FP")
    assert [each["row"] for each in read.dropped] == [3, 4] and "512 x 256" in reasons(read)[0]


def test_360bench_as_it_is_released(folder):
    texts = ["behind", "far", "left", "right"]
    rows = []
    for index in range(4):
        turned = texts[-index:] + texts[:-index] if index else texts
        rows.append(
            {
                "No.": index + 1,
                "image_file": "park.jpg",
                "question": "Where are the tables?",
                "category": "SR",
                "l2-category": "Os",
                "bbox": json.dumps([{"bbox_2d": [256, 64, 384, 128], "label": "tables"}]),
                "index": f"#{index + 1}",
                "multi-choice options": str([f"{key}. {text}" for key, text in zip("ABCD", turned, strict=True)]),
                "answer": "ABCD"[index],
            }
        )
    read = read_items(table(folder / "360Bench.tsv", [*rows, {**rows[0], "index": "#5"}]))
    assert read.format == "360bench" and read.dropped == []
    assert [item.id for item in read.items] == ["#1", "#2", "#3", "#4", "#5"]
    assert all(dict(item.options)[item.key] == "behind" for item in read.items)
    assert [item.more["rotation"] for item in read.items] == [0, 1, 2, 3, 0]
    assert [item.more["rotation_group"] for item in read.items] == ["#1", "#1", "#1", "#1", "#5"]
    made = rotate_options(read.items[0])  # as the authors turned them
    assert [(item.options, item.key) for item in made] == [(item.options, item.key) for item in read.items[:4]]
    assert [item.more["rotation"] for item in made] == [0, 1, 2, 3] and len({item.id for item in made}) == 4
    assert {item.more["rotation_group"] for item in made} == {"#1"}
    assert read.items[0].places is None  # asked is a letter; the boxes are what it is read from
    assert read.items[0].more["places"] == [(45, 22.5, 90, 45)] and read.items[0].more["labels"] == ["tables"]


def test_360bench_with_a_column_of_rotations_and_images_in_base64(folder):
    data = PARK.read_bytes()
    row = {"question": "What?", "A": "x", "B": "y", "category": "FP"}
    rows = [
        {"index": 7, "image": base64.b64encode(data).decode(), "rotation": 0, "answer": "A", **row},
        {"index": 7, "image": "7", "rotation": 1, "answer": "B", **row, "A": "y", "B": "x"},
        {"index": 8, "image": base64.b64encode(b"no image at all" * 10).decode(), "rotation": 0, "answer": "A", **row},
    ]
    read = read_items(table(folder / "data.tsv", rows))
    assert [(item.id, item.more["rotation"], item.more["rotation_group"]) for item in read.items] == [
        ("7-r0", 0, "7-r0"),
        ("7-r1", 1, "7-r0"),
    ]
    assert all(item.image == data for item in read.items) and len({item.panorama for item in read.items}) == 1
    assert "cannot be opened" in reasons(read)[0]
    with pytest.raises(ValueError, match="no options"):
        rotate_options(Item("a", "b", "c", ["d"]))


def test_panoenv_and_omnicot(folder):
    row = GOOD["panoenv"]
    row = {**row, "conversations": [{"from": "human", "value": "<image>\nIs it near?"}], "accu_reward_method": "yes_no"}
    (item,) = read_items(jsonl(folder / "val.jsonl", [row])).items
    assert (item.question, item.references, item.kind) == ("Is it near?", ["No"], "true_false")
    assert item.more == {"accu_reward_method": "yes_no"}
    first, second = read_items(
        jsonl(folder / "metadata.jsonl", [GOOD["omnicot"], {**GOOD["omnicot"], "subtype": None}])
    ).items
    assert (first.kind, first.group, first.more, first.references) == ("s", "t", {"cot": "1."}, ["So."])
    assert second.kind == "t"


def test_hbench_intervals(folder):
    row = GOOD["hbench"]
    rows = [row, {**row, "target_yaw": [350, 10]}, {**row, "target_yaw": [170, -170], "target_pitch": None}]
    bad = [{**row, "target_pitch": []}, {**row, "target_pitch": [-100, 5]}, {**row, "target_yaw": [0, 400]}]
    read = read_items(jsonl(folder / "data.jsonl", rows + bad))
    assert [item.places for item in read.items] == [[(20, 0, 20, 10)], [(0, 0, 20, 10)], [(-180, 0, 20, 180)]]
    assert [item.kind for item in read.items] == ["object", "object", "path"]
    assert read.items[1].more == {"target_yaw": [350, 10], "target_pitch": [-5, 5]}
    assert read.items[2].more["target_pitch"] == [-90, 90]
    assert [each["row"] for each in read.dropped] == [4, 5, 6]


def test_hbench_scenes_are_walked(tmp_path):
    (tmp_path / "0001").mkdir()
    shutil.copy(PARK, tmp_path / "0001" / "pano.jpg")
    asked = {"task": "find the bench", "yaw": [80, 100], "pitch": [-20, 0], "level": [1], "initial yaw": [0]}
    (tmp_path / "0001" / "annotation.json").write_text(json.dumps([asked, {"task": "find the exit", "yaw": [0, 20]}]))
    read = read_items(str(tmp_path))
    assert (read.format, read.dropped) == ("hbench", [])
    assert [(item.question, item.kind, item.places) for item in read.items] == [
        ("find the bench", "object", [(90, -10, 20, 20)]),
        ("find the exit", "path", [(10, 0, 20, 180)]),
    ]
    assert read.items[0].more["initial yaw"] == [0] and read.items[0].panorama == "0001/pano.jpg"


def test_eagle_azimuths_wrap(folder):
    other = {name: value for name, value in GOOD["eagle"].items() if not name.startswith("bbox")}
    other |= {"azimuth_degrees": 180, "bbox_azimuth_extent_degrees": 30, "bbox_elevation_extent_degrees": 4}
    read = read_items(jsonl(folder / "data.jsonl", [GOOD["eagle"], other, {**other, "elevation_degrees": 91}]))
    assert [item.places for item in read.items] == [[(-10, -10, 20, 8)], [(-180, -10, 30, 4)]]
    assert read.items[0].references == ["[-10, -10, 20, 8]"]
    assert [each["row"] for each in read.dropped] == [3]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_quic_references_are_grouped_and_urls_name_files(tmp_path, ending):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(PARK, images / "a b.jpg")
    shutil.copy(PARK, images / "c%20d.jpg")
    encoded, kept = "https://x.org/1/a%20b.jpg", "https://x.org/c%20d.jpg?size=2"
    rows = [
        {"url": encoded, "query": "sky", "annotation": "Blue."},
        {"url": kept, "query": "sky", "annotation": "Grey, with\nclouds."},
        {"url": encoded, "query": "sky", "annotation": "Some clouds."},
        {"url": encoded, "query": "floor", "annotation": "Grass."},
        {"url": "https://x.org/..%2F..%2Fetc%2Fpasswd", "query": "sky", "annotation": "x"},
        {"url": "https://x.org/", "query": "sky", "annotation": "x"},
    ]
    path = table(tmp_path / f"test.{ending}", rows)
    read = read_items(path, images=str(images))
    assert read.format == "quic360"
    assert [(item.panorama, item.question, item.references) for item in read.items] == [
        ("a b.jpg", "sky", ["Blue.", "Some clouds."]),
        ("c%20d.jpg", "sky", ["Grey, with\nclouds."]),
        ("a b.jpg", "floor", ["Grass."]),
    ]
    assert {item.kind for item in read.items} == {"caption"} and len({item.id for item in read.items}) == 3
    assert [each["row"] for each in read.dropped] == [5, 6]
    assert read_items(path, images=str(images), limit=1).items == read.items[:1]  # with both references


def test_our_conversations_become_questions_of_their_own(folder):
    turns = [
        {"from": "human", "value": "<image>\nHow many trees?"},
        {"from": "gpt", "value": "3"},
        {"from": "human", "value": "Where is the car?"},
        {"from": "gpt", "value": "[10, 0, 20, 10]"},
        {"from": "human", "value": "Which one?"},
        {"from": "gpt", "value": "B"},
    ]
    row = {
        "file_name": "park.jpg",
        "conversations": turns,
        "kinds": ["count", "ground", None],
        "places": [None, [[10, 0, 20, 10], [-170, 5, 4, 4]], None],
        "options": [None, None, [["A", "red"], ["B", "blue"]]],
        "keys": [None, None, "B"],
    }
    read = read_items(jsonl(folder / "metadata.jsonl", [row, {**row, "keys": [None, None, "C"]}, {**row, "kinds": []}]))
    count, ground, choice = read.items[:3]
    assert [item.id for item in read.items[:3]] == ["row-1.1", "row-1.2", "row-1.3"]
    assert (count.question, count.references, count.kind, count.places) == ("How many trees?", ["3"], "count", None)
    assert (ground.kind, ground.places) == ("ground", [(10, 0, 20, 10), (-170, 5, 4, 4)])
    assert (choice.options, choice.key, choice.references) == ([("A", "red"), ("B", "blue")], "B", ["blue"])
    assert len(read.items) == 5 and [each["row"] for each in read.dropped] == [2, 3]
    assert "question 3: the answer 'C'" in reasons(read)[0] and "kinds must be a list" in reasons(read)[1]


def test_our_other_shapes(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "What is there?"}]
    rows = [
        {"image": "lab.jpg", "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "It."}]},
        {"image": "lab.jpg", "question": "Where?", "answer": "there", "kind": "ground", "place": [190, 0, 4, 4]},
        {"image": "lab.jpg", "question": "Where?", "answer": "[]", "places": []},
        {"image": "lab.jpg", "question": "Which?", "answer": "red", "options": {"A": "blue", "B": "red"}, "id": "mine"},
        {
            "image": "lab.jpg",
            "messages": [
                {"role": "user", "content": "Where?", "kind": "turn", "place": [1, 2, 3, 4]},
                {"role": "assistant", "content": "there"},
                {"role": "user", "content": "And then?"},
            ],
        },
        {"image": "lab.jpg", "question": "Which?", "answer": "A", "options": {"A": "x"}, "id": "mine"},
    ]
    read = read_items(jsonl(folder / "data.jsonl", rows))
    words, placed, nothing, choice, turn = read.items
    assert (words.question, words.references) == ("What is there?", ["It."])
    assert (placed.kind, placed.places) == ("ground", [(-170, 0, 4, 4)])
    assert nothing.places == []
    assert (choice.id, choice.key, choice.references) == ("mine", "B", ["red"])
    assert (turn.kind, turn.places, turn.id) == ("turn", [(1, 2, 3, 4)], "row-5.1")
    assert [(each["row"], each["reason"]) for each in read.dropped] == [
        (5, "question 2: no answer"),
        (6, "duplicate of 'mine'"),
    ]


def test_what_the_trainer_reads_is_read(folder, samples, tmp_path):
    read = read_items(str(PARK.parent))
    assert [(item.panorama, item.question, item.references[0]) for item in read.items] == [
        (sample["file_name"], sample["query"], sample["annotation"]) for sample in samples
    ]
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    stored = {"bytes": PARK.read_bytes(), "path": None}
    data = Dataset.from_dict({"image": [stored], "question": ["What?"], "answer": ["A park."]}, features)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    for path in ("data.parquet", "saved"):
        (item,) = read_items(str(tmp_path / path)).items
        assert (item.image, item.question, item.references) == (PARK.read_bytes(), "What?", ["A park."])


def test_the_folder_of_a_split_wins(folder):
    jsonl(folder / "metadata.jsonl", [GOOD["panorama"]])
    (folder / "test").mkdir()
    shutil.copy(PARK, folder / "test" / "park.jpg")
    jsonl(folder / "test" / "metadata.jsonl", [GOOD["panorama"], {**GOOD["panorama"], "question": "Second?"}])
    assert len(read_items(str(folder)).items) == 1
    assert [item.question for item in read_items(str(folder), split="test").items] == ["What?", "Second?"]


def test_limit_takes_the_first(folder):
    rows = [{**GOOD["panorama"], "question": f"{count}?"} for count in range(5)]
    path = jsonl(folder / "data.jsonl", [rows[0], {"file_name": "park.jpg"}, *rows[1:]])
    assert [item.question for item in read_items(path, limit=2).items] == ["0?", "1?"]
    with pytest.raises(ValueError, match="limit"):
        read_items(path, limit=0)


def test_images_lie_in_their_folders(folder, tmp_path):
    secret = tmp_path / "secret.jpg"
    shutil.copy(PARK, secret)
    (folder / "link.jpg").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "more").mkdir()
    shutil.copy(PARK, tmp_path / "more" / "other.jpg")
    names = ["../secret.jpg", str(secret), "link.jpg", "up/secret.jpg", "http://a.org/park.jpg", "file:///park.jpg"]
    rows = [{**GOOD["panorama"], "file_name": name} for name in ("park.jpg", *names, "other.jpg")]
    read = read_items(jsonl(folder / "data.jsonl", rows), images=str(tmp_path / "more"))
    assert [item.panorama for item in read.items] == ["park.jpg", "other.jpg"]
    assert [each["row"] for each in read.dropped] == [2, 3, 4, 5, 6, 7]
    assert all("outside" in reason or "address" in reason for reason in reasons(read))


def test_the_cache_of_the_hub_links_to_its_own_files(folder, tmp_path):
    blobs, snapshot = (tmp_path / "datasets--a--b" / part for part in ("blobs", "snapshots/0123"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(PARK, blobs / "deadbeef")
    (snapshot / "park.jpg").symlink_to("../../blobs/deadbeef")
    (snapshot / "lab.jpg").symlink_to(folder / "lab.jpg")
    jsonl(blobs / "cafe", [GOOD["panorama"], {**GOOD["panorama"], "file_name": "lab.jpg"}])
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/cafe")
    read = read_items(str(snapshot))
    assert [item.panorama for item in read.items] == ["park.jpg"]
    assert [each["row"] for each in read.dropped] == [2]


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


DEEP = "[" * 20_000 + "]" * 20_000
NESTED = "[" * 900 + "]" * 900  # read by json, too deep for much else
QUESTION = {"panoenv": "conversations", "quic360": "query"}
ANSWER = {
    "hbench": "target_yaw",
    "eagle": "azimuth_degrees",
    "panoenv": "expected_answer",
    "quic360": "annotation",
}
IMAGE = {"panospace": "image_path", "quic360": "url", "omnicot": "file_name", "panorama": "file_name"}


@pytest.mark.parametrize("format", GOOD)
def test_no_hostile_row_raises_or_passes(folder, format):
    good = GOOD[format]
    names = (QUESTION.get(format, "question"), ANSWER.get(format, "answer"), IMAGE.get(format, "image"))
    values = [None, "", " ", [], {}, ["a"], {"a": 1}, [[]], "\ud800", "a\0b", float("nan"), float("inf"), [None]]
    rows = [{**good, name: value} for name in names for value in values]
    if format == "osr":  # whose answers may be maps
        rows.remove({**good, "answer": {"a": 1}})
    if format in ("panorama", "quic360"):  # whose answers may be lists
        rows.remove({**good, ANSWER.get(format, "answer"): ["a"]})
    rows += [without(good, name) for name in names]
    rows += [json.dumps({**good, name: "DEEP"}).replace('"DEEP"', deep) for name in names for deep in (DEEP, NESTED)]
    rows += ["{", "null", "[]", '"text"', "1" * 5000, DEEP, '{"a": ' * 5000, "\x00", "{}"]
    rows += [{**good, IMAGE.get(format, "image"): name} for name in ("a.jpg", "../data/a", "/etc/passwd", "x" * 5000)]
    (folder / "data.jsonl").write_text("")
    path = jsonl(folder / "data.jsonl", rows)
    with open(path, "ab") as file:
        file.write(json.dumps(good).replace("park", "p\xe4rk").encode("latin-1").replace(b"\\u00e4", b"\xe4") + b"\n")
    read = read_items(path, format=format)
    assert [item.question for item in read.items] == []
    assert [each["row"] for each in read.dropped] == list(range(1, len(rows) + 2))
    assert all(each["reason"] and len(each["reason"]) <= 300 for each in read.dropped)
    json.dumps(read.dropped, ensure_ascii=False).encode()


@pytest.mark.parametrize("format", ["hbench", "eagle"])
@pytest.mark.parametrize("value", [True, "12e", 10**400, float("nan"), [float("inf"), 2], [1, 2, 3], "[1"])
def test_impossible_numbers_are_dropped(folder, format, value):
    read = read_items(jsonl(folder / "data.jsonl", [{**GOOD[format], ANSWER[format]: value}]))
    assert read.items == [] and len(read.dropped) == 1


@pytest.mark.parametrize(
    "answer", [[0, 95, 10, 10], [0, 0, 0, 10], [0, 0, float("nan"), 10], "[0, 0, 400, 10]", [[0, 0, 10, 10], [1]]]
)
def test_impossible_places_are_dropped(folder, answer):
    asked = {**PANOSPACE, "options": [], "answer": answer}
    read = read_items(jsonl(folder / "data.jsonl", [asked]))
    assert read.items == [] and len(read.dropped) == 1
    ours = {**GOOD["panorama"], "places": [answer] if isinstance(answer, str) else answer}
    assert read_items(jsonl(folder / "data.jsonl", [ours])).items == []


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ([{"key": "A", "text": "x"}], "B"),
        ([{"key": "A", "text": "x"}, {"key": "A", "text": "y"}], "A"),
        ([{"key": "A"}], "A"),
        ([{"key": ["A"], "text": "x"}], "A"),
        (["x", ["y", "z", "w"]], "A"),
        ("x", "A"),
        (7, "A"),
        (["x", "x"], "x"),
        ([str(number) for number in range(30)], "A"),
    ],
)
def test_options_that_do_not_hold_are_dropped(folder, options, answer):
    row = {**PANOSPACE, "options": options, "answer": answer}
    read = read_items(jsonl(folder / "data.jsonl", [row]))
    assert read.items == [] and len(read.dropped) == 1
    assert any(word in reasons(read)[0] for word in ("option", "text", "key"))


def test_ids_are_there_once(folder):
    read = read_items(jsonl(folder / "data.jsonl", [PANOSPACE, {**PANOSPACE, "question": "Another?"}]))
    assert [item.question for item in read.items] == ["Where is the tree?"]
    assert read.dropped == [{"row": 2, "reason": "duplicate of 'a1'"}]


def test_rows_of_tables_that_are_torn_are_named(folder):
    lines = [
        "index\timage\tquestion\tA\tB\tanswer",
        "1\tpark.jpg\tWhat?\tx\ty\tA",
        "2\tpark.jpg\tWhat?\tx\ty\tA\ttoo many",
        "3\tpark.jpg\tWhat?",
        '4\tpark.jpg\t"What" is it?\tx\ty\tA',
        "5\tpark.jpg\tWhat?\tx\ty\tA",
        '6\tpark.jpg\t"What?\tx\ty\tA',
        "7\tpark.jpg\tWhat?\tx\ty\tA",
    ]
    (folder / "data.tsv").write_text("\n".join(lines) + "\n")
    read = read_items(str(folder / "data.tsv"))
    assert [item.id for item in read.items] == ["1", "5", "7"]
    assert [each["row"] for each in read.dropped] == [2, 3, 4, 6]
    assert "lines 7 to 8" in reasons(read)[-1]  # the quote that is never closed, which does not swallow the last row


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"colour": 1, "size": 2}\n', r"'colour', 'size'.*panospace, .*quic360.*panorama"),
        ("a.jsonl", "{\n", "fields \\(none\\).*not JSON"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "{", "cannot read"),
        ("a.json", DEEP, "cannot read"),
        ("a.json", "7", "list or an object"),
        ("a.csv", "", "no rows"),
        ("a.csv", "a,b\n1,2\n", "'a', 'b'"),
        ("a.txt", "text", "must end in"),
        ("a.parquet", "no parquet", "cannot read"),
    ],
)
def test_a_file_as_a_whole_says_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_items(str(tmp_path / name))


def test_unknown_formats_and_paths(tmp_path):
    with pytest.raises(ValueError, match="no format 'coco', only panospace, .*panorama"):
        read_items(str(tmp_path), format="coco")
    for path in (str(tmp_path), str(tmp_path / "missing"), "a\0b", "x" * 5000, "\ud800"):
        with pytest.raises(ValueError, match="cannot read"):
            read_items(path)


def test_prompts():
    asked = Item("a", "b", "Which one?", ["red"])
    assert ask_text(asked) == "Which one?"
    asked.options, asked.key = [("A", "red"), ("B", "blue")], "A"
    assert ask_text(asked) == "Which one?\nA. red\nB. blue\nAnswer with the letter of the right option."
    asked.places = [BFoV(0, 0, 10, 10)]
    assert ask_text(asked).endswith("the right option.")
    asked.options = []
    assert ask_text(asked) == "Which one?\nAnswer with [yaw, pitch, x_fov, y_fov] in whole degrees."
    for words in ("Give its BFoV.", "Answer as yaw, x_fov.", "How many degrees to the right?"):
        assert ask_text(Item("a", "b", words, [], places=[])) == words


def test_a_folder_of_scenes_gives_a_question_for_each_of_its_questions(tmp_path):
    from panorama_vlm.synthetic.write import World, write_scenes

    write_scenes(tmp_path / "scenes", World(seed=2, width=128, questions=12), 6, processes=1)
    rows = [json.loads(line) for line in (tmp_path / "scenes/metadata.jsonl").read_text().splitlines()]
    found = read_items(tmp_path / "scenes")
    assert not found.dropped and len(found.items) == sum(len(row["kinds"]) for row in rows)
    asked = [
        (words, kind, options, key, places, turns, row["file_name"])
        for row in rows
        for words, kind, options, key, places, turns in zip(
            *(row[name] for name in ("questions", "kinds", "options", "keys", "places", "turns")), strict=True
        )
    ]
    for item, (words, kind, options, key, places, turns, file) in zip(found.items, asked, strict=True):
        assert (item.question, item.kind, item.key, item.more["turns"]) == (words, kind, key, turns)
        assert [list(option) for option in item.options] == (options or [])
        assert (None if item.places is None else [list(place) for place in item.places]) == places
        assert item.panorama == file
    choices = [item for item in found.items if item.options]
    assert choices and all(
        ask_text(item) in row["conversations"][2 * place]["value"].removeprefix("<image>\n")
        for row in rows
        for place, words in enumerate(row["questions"])
        for item in choices
        if item.question == words and item.panorama == row["file_name"]
    )
