"""Small folders of panoramas for the tests of data, and a collator that keeps what it was given."""

import json
from pathlib import Path

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


def global_batches(samples, world, **options):
    """Global batches put together from what each process sees: sample j is the next one of process j % world."""
    by_rank = [questions(stream(samples, rank=rank, world=world, **options)) for rank in range(world)]
    batches = []
    for step in zip(*by_rank, strict=True):
        shares = [flat(share) for share in step]
        total = sum(map(len, shares))
        batches.append([shares[j % world][j // world] for j in range(total)])
    return batches
