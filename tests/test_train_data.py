import csv
import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from panorama_vlm.data.collators import ConversationCollator, VisionCollator
from panorama_vlm.data.rows import BadSample, conversation
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.tests.tables import folder, numbered
from PIL import Image

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def test_the_samples_folder_is_read_as_it_is(samples):
    train, _ = open_data([DataSource(str(SAMPLES))], stage="finetune", seed=0)
    for sample, line in zip(train, samples, strict=True):
        assert sample["messages"] == conversation(str(SAMPLES / line["file_name"]), line["query"], line["annotation"])
    vision, _ = open_data([DataSource(str(SAMPLES))], stage="vision", seed=0)
    assert len(vision) == len({line["file_name"] for line in samples})


def test_quic_360_csv(tmp_path):
    numbered(tmp_path / "images", 2)
    with open(tmp_path / "quic.csv", "w", newline="") as file:
        rows = [
            ["url", "query", "annotation"],
            ["p0.jpg", "floor", "None"],
            ["https://x.org/a/p1.jpg?s=1", "2", 'a, "b"\nc'],
        ]
        csv.writer(file).writerows(rows)
    source = DataSource(str(tmp_path / "quic.csv"), images=str(tmp_path / "images"))
    first, second = open_data([source], stage="resampler", seed=0)[0]
    assert first["messages"] == conversation(str(tmp_path / "images/p0.jpg"), "floor", "None")
    assert second["messages"] == conversation(str(tmp_path / "images/p1.jpg"), "2", 'a, "b"\nc')


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_llava_conversations_of_several_turns(tmp_path, ending):
    numbered(tmp_path, 1)
    row = {
        "id": 7,
        "image": "p0.jpg",
        "conversations": [
            {"from": "human", "value": "What is <image>\nthis?"},
            {"from": "gpt", "value": "A room."},
            {"from": "human", "value": "And behind?"},
            {"from": "gpt", "value": "A door."},
        ],
    }
    path = tmp_path / f"llava.{ending}"
    path.write_text(json.dumps([row], indent=1) if ending == "json" else json.dumps(row))
    (sample,) = open_data([DataSource(str(path))], stage="finetune", seed=0)[0]
    image = {"type": "image", "image": str(tmp_path / "p0.jpg")}
    assert sample["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, image, {"type": "text", "text": "this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A room."}]},
        {"role": "user", "content": [{"type": "text", "text": "And behind?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A door."}]},
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "parquet", "saved splits", "parquet folder"])
def test_tables_with_messages_and_images_inside(tmp_path, kind, streaming):
    where = numbered(tmp_path / "folder", 2)
    image = Path(where, "p0.jpg").read_bytes()
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Where?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "Here."}]},
    ]
    rows = datasets.Dataset.from_dict({"picture": [{"bytes": image, "path": None}], "messages": [messages]})
    rows = rows.cast_column("picture", datasets.Image())
    path = tmp_path / "table"
    if kind == "saved":
        rows.save_to_disk(path)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
        with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
            open_data([DataSource(str(path), split="test")], stage="vision", seed=0)
    else:
        path = tmp_path / ("t.parquet" if kind == "parquet" else "table/t.parquet")
        path.parent.mkdir(exist_ok=True)
        rows.to_parquet(path)
        path = path if kind == "parquet" else path.parent
    samples, _ = open_data([DataSource(str(path), streaming=streaming)], stage="finetune", seed=0)
    assert next(iter(samples))["messages"] == conversation(image, "Where?", "Here.")


def test_a_conversation_about_several_panoramas(tmp_path, make):
    _, processor = make()
    where = numbered(tmp_path / "folder", 3)
    files = [str(Path(where, f"p{i}.jpg")) for i in (0, 1)]
    images = [Path(file).read_bytes() for file in files]  # saving puts them inside
    turns = [{"role": "user", "content": "<image>Or <image>?"}, {"role": "assistant", "content": "Both."}]
    rows = datasets.Dataset.from_dict({"images": [files], "messages": [turns]})
    rows.cast_column("images", datasets.List(datasets.Image())).save_to_disk(tmp_path / "saved")
    source = DataSource(str(tmp_path / "saved"))
    train, _ = open_data([source], stage="finetune", seed=0)
    assert [part.get("image") for part in train[0]["messages"][0]["content"]] == [images[0], None, images[1], None]
    assert len(ConversationCollator(processor)(list(train))["pixel_values"]) == 2
    assert [sample["image"] for sample in open_data([source], stage="vision", seed=0)[0]] == images


def test_of_all_protocols_only_files_of_the_hub_dataset_itself_are_fetched(make, monkeypatch):
    """Rows come from outside: they must not reach what fsspec can reach."""
    _, processor = make()
    opened = []

    def open_remote(url, mode):
        opened.append(url)
        return (SAMPLES / "dawn.jpg").open(mode)

    monkeypatch.setattr("panorama_vlm.data.collators.fsspec.open", open_remote)
    collate = VisionCollator(processor, 0)
    own = {"image": "hf://datasets/org/set@1a2b/p.jpg", "source": "org/set"}
    assert torch.equal(collate([own])["pixel_values"], collate([{"image": SAMPLES / "dawn.jpg"}])["pixel_values"])
    assert opened == [own["image"]]
    with pytest.raises(BadSample, match="missing image: https://x.org/p.jpg is a URL; download it"):
        collate([{"image": "https://x.org/p.jpg", "source": "org/set"}])
    for url in ("memory://p.jpg", "reference://a", "file:///etc/hostname", "hf://datasets/org/other/p.jpg"):
        with pytest.raises(BadSample, match="has a protocol that is not read"):
            collate([{"image": url, "source": "org/set"}])
    with pytest.raises(BadSample, match="has a protocol that is not read"):
        collate([{"image": "hf://datasets/org/set/a.zip::file://x", "source": "org/set"}])
    assert len(opened) == 1


@pytest.mark.parametrize("name", ["../secret.jpg", "ABSOLUTE", "link.jpg", "folder/../../secret.jpg"])
def test_a_row_names_files_of_its_own_folder_unless_its_source_allows_more(tmp_path, name):
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    Image.new("RGB", (16, 8)).save(tmp_path / "secret.jpg")
    Image.new("RGB", (16, 8)).save(folder / "own.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    name = str(tmp_path / "secret.jpg") if name == "ABSOLUTE" else name
    rows = [{"file_name": each, "query": "q", "annotation": "a"} for each in ("own.jpg", name)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own, outside = open_data([DataSource(str(folder))], stage="finetune", seed=0)[0]
    assert "error" not in own and outside["error"].startswith("path outside: ")
    _, allowed = open_data([DataSource(str(folder), allow_outside=True)], stage="finetune", seed=0)[0]
    assert "error" not in allowed


ODD_ROWS = {
    "a list for a string": {"conversations": [{"from": "human", "value": ["a"]}, {"from": "gpt", "value": "b"}]},
    "a number for a string": {"conversations": [{"from": "human", "value": [{"type": "text", "text": 5}]}]},
    "a part without type": {
        "conversations": [{"from": "human", "value": [{"text": "a"}]}, {"from": "gpt", "value": "b"}]
    },
    "the assistant first": {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
    "more images than there are": {
        "image": [["own.jpg"]],
        "conversations": [{"from": "human", "value": "<image><image>"}],
    },
    "no turn": {"conversations": []},
    "turns that are none": {"conversations": ["a", "b"]},
    "a dict for turns": {"conversations": {"from": "human"}},
    "an image that is a number": {"image": 7, "conversations": [{"from": "human", "value": "a"}]},
    "images that are objects": {"image": [{"a": 1}], "conversations": [{"from": "human", "value": "a"}]},
}


@pytest.mark.parametrize("kind", ODD_ROWS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_every_odd_row_is_skipped_with_a_reason_and_ends_nothing(make, tmp_path, kind, ending):
    _, processor = make()
    Image.new("RGB", (16, 8)).save(tmp_path / "own.jpg")
    good = {"image": "own.jpg", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    rows = [good, {"image": "own.jpg", **ODD_ROWS[kind]}]
    text = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"rows.{ending}").write_text(text)
    samples, _ = open_data([DataSource(str(tmp_path / f"rows.{ending}"))], stage="finetune", seed=0)
    skipped = []
    batch = ConversationCollator(processor)([samples[0], samples[1]], skipped)
    assert len(batch["input_ids"]) == 1
    assert len(skipped) == 1 and skipped[0]["reason"]


def test_a_row_nested_thousands_deep_is_skipped_and_a_file_of_it_refused(tmp_path):
    Image.new("RGB", (16, 8)).save(tmp_path / "own.jpg")
    good = json.dumps({"file_name": "own.jpg", "query": "q", "annotation": "a"})
    deep = '{"file_name": "own.jpg", "query": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{deep}\n")
    first, second = open_data([DataSource(str(tmp_path / "rows.jsonl"))], stage="finetune", seed=0)[0]
    assert "error" not in first and second["error"].startswith("broken row")
    (tmp_path / "rows.json").write_text(f"[{good}, {deep}]")
    with pytest.raises(ValueError, match="cannot read .*rows.json"):
        open_data([DataSource(str(tmp_path / "rows.json"))], stage="finetune", seed=0)


def test_a_folder_of_images_serves_the_vision_stage_alone(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("test.jpg", "a.png", "b/c.jpg"):  # no split is read into these names
        Image.new("RGB", (16, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    samples, _ = open_data([DataSource(str(tmp_path))], stage="vision", seed=0)
    assert [sample["image"] for sample in samples] == [str(tmp_path / n) for n in ("a.png", "b/c.jpg", "test.jpg")]
    with pytest.raises(ValueError, match=r"has the columns \['image'\] and lacks \['question', 'answer'\]"):
        open_data([DataSource(str(tmp_path))], stage="finetune", seed=0)


ROW = {"file_name": "p0.jpg", "query": "Where?", "annotation": "here"}
HEADER, VALUES = list(ROW), list(ROW.values())
SOURCES = {  # the kinds of the docs, as (path of the file in the folder, what it holds); "" is the folder itself
    "metadata.jsonl": ("", "metadata.jsonl", json.dumps(ROW)),
    "metadata.csv": ("", "metadata.csv", f"{','.join(HEADER)}\n{','.join(VALUES)}\n"),
    "metadata of the split": ("", "train/metadata.jsonl", json.dumps(ROW)),
    "jsonl": ("t.jsonl", "t.jsonl", json.dumps(ROW)),
    "json, a line each": ("t.json", "t.json", json.dumps(ROW)),
    "json, a list": ("t.json", "t.json", json.dumps([ROW], indent=2)),
    "csv": ("t.csv", "t.csv", f"{','.join(HEADER)}\n{','.join(VALUES)}\n"),
    "csv with semicolons and a mark": ("t.csv", "t.csv", f"\ufeff{';'.join(HEADER)}\n{';'.join(VALUES)}\n"),
    "csv with tabs": ("t.csv", "t.csv", "\t".join(HEADER) + "\r\n" + "\t".join(VALUES) + "\r\n"),
    "tsv": ("t.tsv", "t.tsv", "\t".join(HEADER) + "\n" + "\t".join(VALUES) + "\n"),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_is_the_same_in_every_kind_of_source(tmp_path, kind, streaming):
    source, name, content = SOURCES[kind]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 8)).save((tmp_path / name).parent / "p0.jpg")
    if kind == "metadata of the split":  # it goes first
        (tmp_path / "metadata.jsonl").write_text(json.dumps({**ROW, "annotation": "elsewhere"}))
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    samples, _ = open_data([DataSource(str(tmp_path / source), streaming=streaming)], stage="finetune", seed=0)
    image = str((tmp_path / name).parent / "p0.jpg")
    assert next(iter(samples))["messages"] == conversation(image, "Where?", "here")


IMAGES = ("image", "images", "file_name", "url", "image_path", "panorama")
QUESTIONS, ANSWERS = ("query", "question", "prompt", "instruction"), ("annotation", "answer", "response")


@pytest.mark.parametrize(
    "names",
    [(name, "query", "annotation") for name in IMAGES]
    + [("image", name, "answer") for name in QUESTIONS]
    + [("image", "question", name) for name in ANSWERS]
    + [("image", name) for name in ("conversations", "messages")],
)
def test_columns_are_found_by_the_names_of_the_docs(tmp_path, names):
    numbered(tmp_path, 1)
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "here"}]
    values = ("p0.jpg", "Where?", "here") if len(names) == 3 else ("p0.jpg", turns)
    (tmp_path / "t.jsonl").write_text(json.dumps(dict(zip(names, values, strict=True))))
    (sample,) = open_data([DataSource(str(tmp_path / "t.jsonl"))], stage="finetune", seed=0)[0]
    assert sample["messages"] == conversation(str(tmp_path / "p0.jpg"), "Where?", "here")
    words = (SAMPLES.parent / "docs/data.md").read_text().split("usual names:")[1].split("**Several")[0]
    assert all(f"`{name}`" in words for name in names)


def test_paths_in_rows_start_from_the_folder_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    numbered(tmp_path / "a/b", 1)
    rows = [{"file_name": name, "query": "q", "annotation": "a"} for name in ("b/p0.jpg", "~/a/b/p0.jpg")]
    (tmp_path / "a/t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for images in (None, str(tmp_path / "a")):
        samples = open_data([DataSource(str(tmp_path / "a/t.jsonl"), images=images)], stage="vision", seed=0)[0]
        assert [sample["image"] for sample in samples] == [f"{tmp_path}/a/b/p0.jpg", f"{tmp_path}/a/~/a/b/p0.jpg"]


def test_columns_of_other_names_are_named(tmp_path):
    numbered(tmp_path, 1)
    (tmp_path / "t.jsonl").write_text('{"pano": "p0.jpg", "q": "Where?", "a": 5}')
    names = {"image_column": "pano", "question_column": "q", "answer_column": "a"}
    (sample,) = open_data([DataSource(str(tmp_path / "t.jsonl"), **names)], stage="finetune", seed=0)[0]
    assert sample["messages"] == conversation(str(tmp_path / "p0.jpg"), "Where?", "5")
    with pytest.raises(ValueError, match=r"no question_column 'query', its columns are \['pano', 'q', 'a'\]"):
        open_data([DataSource(str(tmp_path / "t.jsonl"), question_column="query")], stage="finetune", seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: DataSource(str(p / "nowhere")), "no such file or folder, and it is no name of a Hub dataset"),
        (lambda p: DataSource("no/where"), "the Hub does not give such a dataset"),
        (lambda p: DataSource(str(p)), "the folder has no metadata.jsonl"),
        (lambda p: DataSource(numbered(p, 1), weight=0), "weight of .* must be positive, got 0"),
        (lambda p: DataSource(folder(p, [{"file_name": "p.jpg"}])), r"lacks \['question', 'answer'\]"),
        (lambda p: DataSource(folder(p, [])), "has no samples"),
        (lambda p: DataSource(folder(p, ["no json"])), "rows can be read: line 1 is not JSON: Expecting value at 1 of"),
        (lambda p: DataSource(numbered(p, 3), images=str(p / "x")), "none of the first 3 images .* `images` must name"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_is_wrong_as_a_whole_is_refused(tmp_path, make, message, streaming):
    source = make(tmp_path)
    source.streaming = streaming
    if streaming and message.startswith("none of"):
        pytest.skip("known while streaming only")
    with pytest.raises(ValueError, match=message):
        open_data([source], stage="finetune", seed=0)


def test_options_that_make_no_sense_are_refused(tmp_path):
    source = DataSource(numbered(tmp_path, 2))
    for options, message in [
        ({"stage": "later"}, "stage must be one of .* got 'later'"),
        ({"validation_share": 1.0}, r"validation_share must be in \[0, 1\), got 1.0"),
        ({"validation_share": 0.9}, "leaves none to train on"),
        ({"sources": []}, "give at least one DataSource"),
    ]:
        arguments = {"sources": [source], "stage": "vision", **options}
        with pytest.raises(ValueError, match=message):
            open_data(arguments.pop("sources"), seed=0, **arguments)


def test_tables_that_are_no_conversations_are_a_broken_row(tmp_path):
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "query": "What?", "annotation": "That.", "tables": [["no", "turns"], 3]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    train, _ = open_data([DataSource(str(tmp_path))], stage="finetune", seed=0)
    assert "'tables' must be a list of conversations" in train[0]["error"]


@pytest.mark.parametrize("stage", ["vision", "finetune"])
def test_the_panoramas_that_are_kept_do_not_depend_on_where_the_data_lie(stage, tmp_path):
    """The same seed trained on other panoramas in another folder."""
    kept = []
    for name in ("a", "another/place", "z"):
        shutil.copytree(SAMPLES, tmp_path / name)
        train, validation = open_data([DataSource(str(tmp_path / name))], stage=stage, seed=3, validation_share=0.3)
        kept.append([[sample["name"].rpartition(":")[2] for sample in each] for each in (train, validation)])
    assert kept[0] == kept[1] == kept[2] and kept[0][1]
