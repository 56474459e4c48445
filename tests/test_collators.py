import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from panorama_vlm.data.collators import ConversationCollator, VisionCollator
from panorama_vlm.data.rows import BadSample, conversation
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.data.stream import BatchStream
from panorama_vlm.tests.tables import folder, numbered
from PIL import Image
from torch.utils.data import DataLoader

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


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
