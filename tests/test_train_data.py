import csv
import json
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from panorama_vlm.data.collators import ConversationCollator, VisionCollator
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.skipped import SkippedSamples, TooManyBadSamples
from panorama_vlm.data.sources import BadSample, DataSource, conversation
from panorama_vlm.data.stream import BatchStream
from PIL import Image
from torch.utils.data import DataLoader
from transformers.image_processing_utils import BatchFeature

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def folder(path, lines, image="room.jpg"):
    """A folder with `metadata.jsonl` and one small panorama for each name in its lines that ends in .jpg."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "metadata.jsonl").write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    for number, name in enumerate(sorted({line["file_name"] for line in lines if isinstance(line, dict)} - {None})):
        if name.startswith("p"):
            Image.new("RGB", (16, 8), (8 * number, 0, 0)).save(path / name)
    return str(path)


def numbered(path, count, panoramas=None, start=0):
    """`count` samples whose questions are their numbers, about `panoramas` panoramas in turn."""
    panoramas = panoramas or count
    lines = [
        {"file_name": f"p{start + i % panoramas}.jpg", "query": str(start + i), "annotation": "a" * (1 + i * 7 % 10)}
        for i in range(count)
    ]
    return folder(path, lines)


class Record:
    """A collator that keeps what it was given; samples with the answer "bad" are bad."""

    def __call__(self, samples, skipped):
        good = []
        for sample in samples:
            if "error" in sample or sample["messages"][-1]["content"][0]["text"] == "bad":
                skipped.append({"sample": sample["name"], "source": sample["source"], "reason": "bad: of course"})
            else:
                good.append(sample)
        return BatchFeature({"samples": good}) if good else None


def question(sample):
    return int(sample["messages"][0]["content"][1]["text"])


def questions(steps):
    """What is asked in each micro-batch of each step."""
    return [[[question(sample) for sample in batch["samples"]] for batch in step.micro_batches] for step in steps]


def flat(nested):
    return [x for each in nested for x in (flat(each) if isinstance(each, list) else [each])]


def stream(samples, workers=0, **options):
    made = BatchStream(samples, Record(), **{"batch_size": 4, **options})
    return list(DataLoader(made, batch_size=None, num_workers=workers)) if workers else list(made)


@pytest.fixture
def eleven(tmp_path):
    return open_data([DataSource(numbered(tmp_path / "eleven", 11))], stage="finetune", seed=0)[0]


def global_batches(samples, world, **options):
    """Global batches put together from what each process sees: sample j is the next one of process j % world."""
    by_rank = [questions(stream(samples, rank=rank, world=world, **options)) for rank in range(world)]
    batches = []
    for step in zip(*by_rank, strict=True):
        shares = [flat(share) for share in step]
        total = sum(map(len, shares))
        batches.append([shares[j % world][j // world] for j in range(total)])
    return batches


# Order


def test_an_epoch_shows_every_sample_once_in_an_order_that_changes_with_the_epoch(eleven):
    steps = questions(stream(eleven, epochs=3, seed=5))
    epochs = [flat(steps[i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(flat(step)) for step in steps] == [4, 4, 3] * 3
    assert questions(stream(eleven, epochs=3, seed=5)) == steps != questions(stream(eleven, epochs=3, seed=6))
    assert flat(questions(stream(eleven, shuffle=False))) == list(range(11))


@pytest.mark.parametrize("grouped", [False, True])
def test_global_batches_do_not_depend_on_processes_accumulation_or_workers(eleven, grouped):
    common = {"epochs": 2, "seed": 1, "group_by_length": grouped}
    expected = global_batches(eleven, 1, batch_size=4, **common)
    assert [len(batch) for batch in expected] == [4, 4, 3, 4, 4, 3]
    assert global_batches(eleven, 2, batch_size=2, **common) == expected
    assert global_batches(eleven, 1, batch_size=2, accumulation=2, **common) == expected
    assert global_batches(eleven, 2, batch_size=1, accumulation=2, **common) == expected
    assert global_batches(eleven, 4, batch_size=1, **common) == expected


def test_micro_batches_are_cut_to_the_batch_size_and_none_is_empty(eleven):
    steps = stream(eleven, batch_size=2, accumulation=2, world=2, rank=1)
    # 8 and 3 samples in a step: this process has samples 1, 3, 5, 7 and 1.
    assert [[len(batch["samples"]) for batch in step.micro_batches] for step in steps] == [[2, 2], [1]]
    assert [(step.samples, step.seen) for step in steps] == [(4, 8), (1, 3)]
    last = stream(eleven, batch_size=5, world=2, rank=1)[-1]  # one sample is left, the other process has it
    assert (last.micro_batches, last.samples, last.seen) == ([], 0, 1)


def test_a_restart_from_any_step_goes_on_as_if_nothing_had_happened(eleven):
    whole = questions(stream(eleven, epochs=2, group_by_length=True))
    for start in range(7):
        assert questions(stream(eleven, epochs=2, group_by_length=True, start_step=start)) == whole[start:]


def test_workers_make_the_same_steps_in_the_same_order(eleven):
    options = {"epochs": 2, "start_step": 1, "world": 2, "rank": 1, "batch_size": 2}
    alone, together = stream(eleven, **options), stream(eleven, workers=2, **options)
    assert questions(alone) == questions(together)
    assert [step.index for step in together] == [1, 2, 3, 4, 5]
    assert [step.epoch for step in together] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])


def test_steps_are_counted_from_epochs_or_given(eleven):
    def steps(**options):
        made = BatchStream(eleven, Record(), batch_size=4, **options)
        assert made.steps == len(list(made))
        return made.steps

    assert [steps(epochs=e) for e in (1.0, 2.0, 0.5, 1.4)] == [3, 6, 2, 5]
    assert steps(max_steps=7) == steps(max_steps=7, epochs=None) == 7
    made = BatchStream(eleven, Record(), batch_size=4)
    assert [made.seen_before(step) for step in range(5)] == [0, 4, 8, 11, 15]
    with pytest.raises(ValueError, match="max_steps must say how many steps"):
        BatchStream(eleven, Record(), batch_size=4, epochs=None)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        BatchStream(eleven, Record(), batch_size=4, rank=2, world=2)


def test_batches_grouped_by_length_hold_texts_of_similar_length(tmp_path):
    samples, _ = open_data([DataSource(numbered(tmp_path, 40))], stage="finetune", seed=0)

    def spread(grouped):
        steps = stream(samples, group_by_length=grouped)
        assert sorted(flat(questions(steps))) == list(range(40))
        lengths = [
            [len(s["messages"][1]["content"][0]["text"]) for s in step.micro_batches[0]["samples"]] for step in steps
        ]
        return np.mean([max(batch) - min(batch) for batch in lengths]), [batch[0] for batch in lengths]

    grouped, firsts = spread(True)
    assert 3 * grouped < spread(False)[0]
    assert firsts != sorted(firsts)  # short and long batches come mixed


# Mixtures and splits


def test_weights_say_how_often_a_sample_is_seen_in_an_epoch(tmp_path):
    sources = [
        DataSource(numbered(tmp_path / "once", 6), weight=1.0),
        DataSource(numbered(tmp_path / "more", 4, start=100), weight=2.5),
        DataSource(numbered(tmp_path / "half", 8, start=200), weight=0.5),
    ]
    samples, _ = open_data(sources, stage="finetune", seed=0)
    assert len(samples) == 18
    epochs = [Counter(flat(questions(stream(samples, epochs=2, start_step=s, max_steps=s + 5)))) for s in (0, 5, 10)]
    for seen in epochs:
        assert {seen[i] for i in range(6)} == {1}
        assert sorted(seen[100 + i] for i in range(4)) == [2, 2, 3, 3]
        assert sorted(seen[200 + i] for i in range(8)) == [0] * 4 + [1] * 4
    assert len({tuple(sorted(seen.items())) for seen in epochs}) > 1  # another half


@pytest.mark.parametrize("stage", ["vision", "finetune"])
def test_a_panorama_is_in_training_or_in_validation_never_in_both(tmp_path, stage):
    where = numbered(tmp_path, 30, panoramas=10)
    sources = [DataSource(where), DataSource(where, weight=3.0)]
    train, validation = open_data(sources, stage=stage, seed=3, validation_share=0.3)

    def files(samples):
        return [s["image"] if stage == "vision" else s["messages"][0]["content"][0]["image"] for s in samples]

    assert len(set(files(validation))) == 3 and len(set(files(train))) == 7
    assert not set(files(train)) & set(files(validation))
    assert len(train) + len(validation) == (10 if stage == "vision" else 60)
    assert len(validation.epoch(0, 0)) == len(validation)  # weights are for training
    again = open_data(sources, stage=stage, seed=3, validation_share=0.3)[1]
    assert files(again) == files(validation) != files(open_data(sources, stage=stage, seed=4, validation_share=0.3)[1])
    assert open_data(sources, stage=stage, seed=3)[1] is None


def test_panoramas_inside_a_dataset_are_told_apart_by_their_content(tmp_path):
    where = numbered(tmp_path / "folder", 4)
    files = [Path(where, f"p{i}.jpg").read_bytes() for i in (0, 1, 0, 2)]
    rows = {"image": [{"bytes": data, "path": "same name.jpg"} for data in files]}
    datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).save_to_disk(
        tmp_path / "saved"
    )
    samples, _ = open_data([DataSource(str(tmp_path / "saved"))], stage="vision", seed=0)
    assert [sample["image"] for sample in samples] == [files[0], files[1], files[3]]


# Formats


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


def test_a_panorama_without_a_pair_is_left_out_where_its_stage_compares(make):
    _, processor = make()
    panorama = Image.new("RGB", (512, 256))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": panorama}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    alone = torch.tensor([[True, True, *[False] * 7]])  # the global view and one tile
    for compares in (False, True):
        collate = ConversationCollator(processor, compares=compares)
        collate.processor.image_processor = OneView(collate.processor.image_processor, alone)
        skipped = []
        batch = collate([{"messages": messages}], skipped)
        assert (batch is None) == compares
        assert not compares or "nothing to compare" in skipped[0]["reason"]


class OneView:
    """An image processor whose panoramas show one tile."""

    def __init__(self, processor, mask):
        self.processor, self.mask = processor, mask

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, *args, **kwargs):
        inputs = self.processor(*args, **kwargs)
        inputs["view_mask"] = list(self.mask)
        return inputs


def test_a_folder_of_images_serves_the_vision_stage_alone(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("test.jpg", "a.png", "b/c.jpg"):  # no split is read into these names
        Image.new("RGB", (16, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    samples, _ = open_data([DataSource(str(tmp_path))], stage="vision", seed=0)
    assert [sample["image"] for sample in samples] == [str(tmp_path / n) for n in ("a.png", "b/c.jpg", "test.jpg")]
    with pytest.raises(ValueError, match=r"has the columns \['image'\] and lacks \['question', 'answer'\]"):
        open_data([DataSource(str(tmp_path))], stage="finetune", seed=0)


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
        (lambda p: DataSource(folder(p, ["no json"])), "lacks"),
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


# Streams


def test_a_stream_shows_every_sample_once_a_pass_and_goes_on_anew(tmp_path):
    source = DataSource(numbered(tmp_path, 12), streaming=True)
    samples, _ = open_data([source], stage="finetune", seed=0)
    with pytest.raises(TypeError):
        len(samples)
    with pytest.raises(ValueError, match="a stream has no known length"):
        BatchStream(samples, Record(), batch_size=4)
    steps = stream(samples, max_steps=6)
    passes = [flat(questions(steps)[i : i + 3]) for i in (0, 3)]
    assert [sorted(p) for p in passes] == [list(range(12))] * 2
    assert passes[0] != passes[1]
    assert [step.epoch for step in steps] == [0, 0, 0, 1, 1, 1]


def test_the_steps_of_a_stream_do_not_depend_on_processes_workers_or_restarts(tmp_path):
    sources = [
        DataSource(numbered(tmp_path / "a", 7), streaming=True),
        DataSource(numbered(tmp_path / "b", 5, start=100), weight=2.0),
    ]
    samples, _ = open_data(sources, stage="finetune", seed=0)
    common = {"max_steps": 5, "seed": 2}
    expected = global_batches(samples, 1, batch_size=4, **common)
    assert global_batches(samples, 2, batch_size=2, **common) == expected
    assert global_batches(samples, 2, batch_size=1, accumulation=2, **common) == expected
    for start in range(5):
        assert global_batches(samples, 1, batch_size=4, start_step=start, **common) == expected[start:]
    assert [flat(step) for step in questions(stream(samples, workers=2, start_step=1, **common))] == expected[1:]
    copied = pickle.loads(pickle.dumps(samples))  # as workers that are spawned get it
    assert global_batches(copied, 1, batch_size=4, **common) == expected


def test_the_weights_of_streams_are_probabilities(tmp_path):
    sources = [
        DataSource(numbered(tmp_path / "a", 3), streaming=True),
        DataSource(numbered(tmp_path / "b", 30, start=100), streaming=True, weight=3.0),
    ]
    samples, _ = open_data(sources, stage="finetune", seed=0)
    seen = flat(questions(stream(samples, max_steps=100)))
    assert np.mean([number >= 100 for number in seen]) == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 400))


@pytest.mark.parametrize("stage", ["vision", "finetune"])
def test_a_stream_is_split_by_panorama_too(tmp_path, stage):
    source = DataSource(numbered(tmp_path, 60, panoramas=20), streaming=True)
    train, validation = open_data([source], stage=stage, seed=0, validation_share=0.3)

    def one_pass(samples):
        rows = [s for s, _ in zip(samples, range(200), strict=False)]
        rows = [row for row in rows if row["epoch"] == 0]
        return [s["image"] if stage == "vision" else s["messages"][0]["content"][0]["image"] for s in rows]

    a, b = one_pass(train), one_pass(validation)
    assert not set(a) & set(b) and len(set(a) | set(b)) == 20
    assert len(a) + len(b) == (20 if stage == "vision" else 60)
    assert 1 <= len(set(b)) <= 12


# Collators


def broken_folder(path):
    """Two good samples and one of each kind of bad ones."""
    good = {"file_name": "p0.jpg", "query": "floor", "annotation": "wood"}
    where = folder(
        path,
        [
            good,
            {**good, "file_name": "gone.jpg"},
            {**good, "file_name": "text.jpg"},
            {**good, "file_name": "cut.jpg"},
            {**good, "query": " "},
            {**good, "annotation": None},
            {**good, "annotation": "wood and " * 200},
            {**good, "query": "<image> and <image>"},
            {**good, "file_name": None},
            "{broken",
            "[1]",
            {**good, "query": "ceiling"},
        ],
    )
    Path(where, "text.jpg").write_text("no image")
    data = (SAMPLES / "dawn.jpg").read_bytes()
    Path(where, "cut.jpg").write_bytes(data[: len(data) // 2])
    return where


REASONS = [
    (1, r"missing image: .*gone\.jpg does not exist"),
    (2, r"unreadable image: .*text\.jpg"),
    (3, r"unreadable image: .*cut\.jpg"),
    (4, "empty question: in turn 1"),
    (5, "empty answer: in turn 2"),
    (6, "too long: .* text tokens, at most max_text_length=64"),
    (7, r"number of <image>: the texts have 2, the sample has 1 images"),
    (8, "missing image: none in the column 'file_name'"),
    (9, "broken row: "),
    (10, "broken row: it must be a JSON object"),
]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_samples_are_left_out_with_their_reasons(tmp_path, make, streaming):
    _, processor = make(max_text_length=64)
    where = broken_folder(tmp_path)
    samples, _ = open_data([DataSource(where, streaming=streaming)], stage="finetune", seed=0)
    options = {"batch_size": 12, "shuffle": False, "max_steps": 1}
    (step,) = BatchStream(samples, ConversationCollator(processor), **options)
    (batch,) = step.micro_batches
    assert step.samples == len(batch["input_ids"]) == len(batch["pixel_values"]) == 2
    assert len(step.skipped) == len(REASONS)
    for record, (row, reason) in zip(step.skipped, REASONS, strict=True):
        assert record["sample"].split()[:2] == ["row", str(row)]
        assert (record["source"], record["step"]) == (where, 0)
        assert re.match(reason, record["reason"]), record["reason"]


def test_bad_panoramas_are_left_out_of_the_vision_stage(tmp_path, make):
    _, processor = make()
    samples, _ = open_data([DataSource(broken_folder(tmp_path))], stage="vision", seed=0)
    (step,) = BatchStream(samples, VisionCollator(processor, 0), batch_size=12, shuffle=False)
    assert step.samples == 1  # p0.jpg
    kinds = Counter(record["reason"].split(":")[0] for record in step.skipped)
    assert kinds == {"missing image": 2, "unreadable image": 2, "broken row": 2}


def test_a_sample_without_an_answer_or_with_an_unknown_speaker_is_left_out(tmp_path, make):
    _, processor = make()
    numbered(tmp_path, 1)
    talk = [{"from": "human", "value": "Where?"}], [{"from": "robot", "value": "Where?"}], 5
    (tmp_path / "t.json").write_text(json.dumps([{"image": "p0.jpg", "conversations": each} for each in talk]))
    samples, _ = open_data([DataSource(str(tmp_path / "t.json"))], stage="finetune", seed=0)
    skipped = []
    assert ConversationCollator(processor)(list(samples), skipped) is None
    for record, reason in zip(
        skipped, ("no answer: ", "broken row: a turn is from 'robot'", "broken row: "), strict=True
    ):
        assert record["reason"].startswith(reason)
    with pytest.raises(BadSample, match="no answer"):
        ConversationCollator(processor)([samples[0]])


def test_a_batch_is_what_the_processor_makes_of_all_samples_at_once(make, samples):
    _, processor = make()
    train, _ = open_data([DataSource(str(SAMPLES))], stage="finetune", seed=0)
    batch = ConversationCollator(processor)([train[i] for i in (0, 5, 9)])
    talks = [
        conversation(str(SAMPLES / s["file_name"]), s["query"], s["annotation"])
        for s in (samples[i] for i in (0, 5, 9))
    ]
    expected = processor.apply_chat_template(talks, return_labels=True)
    assert set(batch) == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


def test_turns_of_a_long_conversation_are_all_learned_from(make, tmp_path):
    _, processor = make()
    numbered(tmp_path, 1)
    values = ["<image>\nfloor", "wood", "ceiling", "white"]
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)]
    (tmp_path / "t.json").write_text(json.dumps([{"image": "p0.jpg", "conversations": turns}]))
    samples, _ = open_data([DataSource(str(tmp_path / "t.json"))], stage="finetune", seed=0)
    batch = ConversationCollator(processor)(list(samples))
    supervised = processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0])
    assert "wood" in supervised and "white" in supervised and "floor" not in supervised and "ceil" not in supervised


def test_masks_of_views_are_filled_in_where_another_sample_has_one(make, monkeypatch):
    _, processor = make()
    collate = VisionCollator(processor, 0)
    prepared = [
        {"pixel_values": torch.zeros(1, 2, 3, 4, 4)},
        {"pixel_values": torch.ones(1, 2, 3, 4, 4), "view_mask": torch.tensor([[True, False]])},
    ]
    monkeypatch.setattr(collate, "prepare", lambda sample: prepared[sample["index"]])
    batch = collate([{"index": 0}, {"index": 1}])
    assert batch["view_mask"].tolist() == [[True, True], [True, False]]
    assert set(collate([{"index": 0}])) == {"pixel_values"}


def test_the_heading_follows_from_seed_epoch_and_sample_and_not_from_who_prepares_it(make):
    _, processor = make()
    samples, _ = open_data([DataSource(str(SAMPLES))], stage="vision", seed=0)

    def views(seed=0, world=1, rank=0, workers=0, epochs=2):
        made = BatchStream(
            samples, VisionCollator(processor, seed), batch_size=6 // world, world=world, rank=rank, epochs=epochs
        )
        steps = DataLoader(made, batch_size=None, num_workers=workers)
        return [batch["pixel_values"] for step in steps for batch in step.micro_batches]

    whole = views()
    for rank in range(2):
        share = views(world=2, rank=rank, workers=2 * rank)
        assert all(torch.equal(a[rank::2], b) for a, b in zip(whole, share, strict=True))
    assert not torch.equal(whole[0], views(seed=1)[0])
    one = {**samples[0], "epoch": 0}
    collate = VisionCollator(processor, 0)
    assert not torch.equal(collate([one])["pixel_values"], collate([{**one, "epoch": 1}])["pixel_values"])
    plain = processor.image_processor(images=[one["image"]], return_tensors="pt")["pixel_values"]
    still = VisionCollator(processor, 0, random_heading=False)
    assert torch.equal(still([one])["pixel_values"], plain)


def test_prepared_views_are_kept_and_their_headings_recur(make, tmp_path):
    _, processor = make()
    samples, _ = open_data([DataSource(str(SAMPLES))], stage="vision", seed=0)
    collate = VisionCollator(processor, 0, cache_dir=tmp_path)
    batches = [collate([{**samples[0], "epoch": epoch}])["pixel_values"] for epoch in range(30)]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 8
    uncached = processor.image_processor(
        images=[samples[0]["image"]] * 8, yaw_offsets=range(0, 360, 45), return_tensors="pt"
    )
    for batch in batches:
        assert min((batch[0] - views).abs().max() for views in uncached["pixel_values"]) < 0.5 / 127
    talk, _ = open_data([DataSource(str(SAMPLES))], stage="finetune", seed=0)
    ConversationCollator(processor, cache_dir=tmp_path / "talk")([talk[0]])
    assert len(list((tmp_path / "talk").rglob("*.safetensors"))) == 1
    assert processor.image_processor.cache_dir is None


def test_a_warning_about_images_is_given_once(make, tmp_path):
    _, processor = make()
    for height in range(8, 13):
        Image.new("RGB", (64, height)).save(tmp_path / f"{height}.png")
    samples, _ = open_data([DataSource(str(tmp_path))], stage="vision", seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        VisionCollator(processor, 0)(list(samples))
    assert len(caught) == 1


# Bad samples


def test_bad_samples_are_listed_and_too_many_stop_the_run(tmp_path):
    skipped = SkippedSamples(tmp_path / "out" / "skipped.jsonl", max_share=0.25, minimum=8)
    record = {"sample": "row 1", "source": "data", "reason": "missing image: a.jpg does not exist", "step": 0}
    skipped.add([record, {**record, "reason": "missing image: b.jpg does not exist"}], seen=4)  # too few to judge
    skipped.add([], seen=4)
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == record and len(lines) == 2
    with pytest.raises(TooManyBadSamples) as caught:
        skipped.add([{**record, "reason": "too long: 9 text tokens", "step": 2}], seen=3)
    for part in ("3 of 11", "share of 0.25", "missing image (2); too long (1)", "skipped.jsonl"):
        assert part in str(caught.value)


def test_a_restart_forgets_what_it_does_again(tmp_path):
    path = tmp_path / "skipped.jsonl"
    before = SkippedSamples(path)
    for step in range(4):
        before.add([{"sample": step, "source": "", "reason": "too long: x", "step": step}], seen=10)
    kept = path.read_text().splitlines()[:2]
    with path.open("a") as file:
        file.write('{"sample": "cut o')
    after = SkippedSamples(path)
    after.rewind(2, seen=20)
    assert path.read_text().splitlines() == kept
    assert (after.bad, after.seen) == (2, 20)
    SkippedSamples(path, write=False).add([{"reason": "x", "step": 1}], seen=10)
    assert path.read_text().splitlines() == kept
    SkippedSamples(tmp_path / "none.jsonl").rewind(0)
    with pytest.raises(ValueError, match=r"max_share must be in \[0, 1\], got 2"):
        SkippedSamples(path, max_share=2)
