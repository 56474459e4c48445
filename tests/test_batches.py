import json
import pickle
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.skipped import SkippedSamples, TooManyBadSamples
from panorama_vlm.data.sources import DataSource
from panorama_vlm.data.stream import BatchStream
from panorama_vlm.tests.tables import Record, flat, global_batches, numbered, questions, stream
from PIL import Image
from torch.utils.data import DataLoader


@pytest.fixture
def eleven(tmp_path):
    return open_data([DataSource(numbered(tmp_path / "eleven", 11))], stage="finetune", seed=0)[0]


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


def parts(samples, world, workers, **options):
    """The steps that each worker of each process makes."""
    found = {}
    for rank in range(world):
        for step in stream(samples, workers=workers, rank=rank, world=world, **options):
            found.setdefault((rank, step.index % max(workers, 1)), []).append(step)
    return found


@pytest.mark.parametrize(("shards", "world", "workers"), [(4, 2, 2), (1, 2, 2), (4, 1, 3), (5, 2, 0), (2, 2, 2)])
def test_readers_share_a_stream_and_each_sample_is_seen_once_a_pass(tmp_path, shards, world, workers):
    path = tmp_path / "parquet"
    path.mkdir()
    Image.new("RGB", (16, 8)).save(path / "room.jpg")
    for shard in range(shards):
        rows = [{"image": "room.jpg", "question": str(10 * shard + i), "answer": "a"} for i in range(10)]
        datasets.Dataset.from_list(rows).to_parquet(path / f"{shard}.parquet")
    samples, _ = open_data([DataSource(str(path), streaming=True)], stage="finetune", seed=0)
    found = parts(samples, world, workers, batch_size=1, max_steps=32 * max(workers, 1))
    seen = {}
    for part, steps in found.items():
        first = [step for step in steps if step.epoch == 0]
        seen[part] = flat(questions(first))
        assert len(first) < len(steps)
    assert len(seen) == world * max(workers, 1)
    numbers = flat(list(seen.values()))
    assert sorted(numbers) == list(range(10 * shards)) != numbers
    opened = {part: {number // 10 for number in numbers} for part, numbers in seen.items()}
    if shards == len(seen):  # each reader opens a file of its own
        assert sorted(flat([list(each) for each in opened.values()])) == list(range(shards))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "mixture"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was_from_any_step(tmp_path, monkeypatch, kind, workers):
    monkeypatch.setattr("panorama_vlm.data.reader._BLOCK", 5)
    where = numbered(tmp_path / "a", 17)
    if kind == "parquet":
        rows = datasets.load_dataset("json", data_files=f"{where}/metadata.jsonl", split="train")
        for shard in range(3):
            rows.shard(3, shard).to_parquet(f"{where}/{shard}.parquet")
        Path(where, "metadata.jsonl").unlink()
    sources = [DataSource(where, streaming=True)]
    if kind == "mixture":
        sources.append(DataSource(numbered(tmp_path / "b", 7, start=100), weight=2.0))
    options = {"max_steps": 16, "seed": 2, "batch_size": 2, "accumulation": 2}
    samples, _ = open_data(sources, stage="finetune", seed=0)
    whole = stream(samples, workers=workers, **options)
    for start in range(1, 16, 1 if workers == 0 else 3):
        made = BatchStream(pickle.loads(pickle.dumps(samples)), Record(), start_step=start, **options)
        made.states = {step.index % max(workers, 1): json.loads(json.dumps(step.state)) for step in whole[:start]}
        rest = list(DataLoader(made, batch_size=None, num_workers=workers))
        assert questions(rest) == questions(whole[start:])
        assert [step.micro_batches[0]["samples"][0]["index"] for step in rest[:1]] == [4 * start]
    made = BatchStream(samples, Record(), start_step=8, **options)
    with pytest.raises(ValueError, match="only from the state of reader 0 of 1"):
        next(iter(made))


def test_a_reader_without_a_sample_says_what_to_do(tmp_path):
    samples, _ = open_data([DataSource(numbered(tmp_path, 2), streaming=True)], stage="finetune", seed=0)
    with pytest.raises(ValueError, match="share of reader 2 of 4: take fewer processes or num_workers"):
        stream(samples, rank=2, world=4, max_steps=1)


def test_in_the_vision_stage_a_panorama_counts_once_a_block_of_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("panorama_vlm.data.reader._BLOCK", 12)
    source = DataSource(numbered(tmp_path, 24, panoramas=4), streaming=True)
    samples, _ = open_data([source], stage="vision", seed=0)
    first = [sample["image"] for sample, _ in zip(samples, range(9), strict=False) if sample["epoch"] == 0]
    assert len(first) == 8 and len(set(first[:4])) == len(set(first[4:])) == 4


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
