"""Data: a folder with `metadata.jsonl` (`file_name, query, annotation`, as in QuIC-360) as batches of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, load_dataset
from transformers.image_processing_utils import BatchFeature

from ..image_processing_panorama import to_erp_tensor
from ..processing_panorama import PanoramaProcessor


def load_samples(folder: str) -> Dataset:
    """`image`, `query` and `annotation` of each line of `FOLDER/metadata.jsonl`; images are decoded when read.

    Raises:
        ValueError: for a missing column or a missing file, which it names.
    """
    samples = load_dataset("json", data_files=str(Path(folder, "metadata.jsonl")), split="train")
    missing = {"file_name", "query", "annotation"} - set(samples.column_names)
    if missing:
        raise ValueError(f"metadata.jsonl lacks the fields {sorted(missing)}, it has {samples.column_names}")
    paths = [str(Path(folder, name)) for name in samples["file_name"]]
    absent = [path for path in paths if not Path(path).is_file()]
    if absent:
        raise ValueError(f"{len(absent)} panoramas of metadata.jsonl do not exist, the first is {absent[0]!r}")
    return samples.add_column("image", paths).cast_column("image", Image())


class VisionCollator:
    """Batches of stage `vision`: panoramas, each turned to a random heading."""

    def __init__(self, processor: PanoramaProcessor, seed: int):
        self.processor = processor
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, samples: list[dict[str, Any]]) -> BatchFeature:
        panoramas = []
        for sample in samples:
            erp = to_erp_tensor(sample["image"])  # [3, H, W]
            shift = int(torch.randint(erp.shape[-1], (), generator=self.generator))
            panoramas.append(erp.roll(shift, dims=-1))
        return self.processor.image_processor(panoramas, return_tensors="pt")


class ConversationCollator:
    """Batches of the later stages: a question about a panorama, and its answer."""

    def __init__(self, processor: PanoramaProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict[str, Any]]) -> BatchFeature:
        return self.processor.apply_chat_template([conversation(**sample) for sample in samples], return_labels=True)


def conversation(image: Any, query: str, annotation: str | None = None, **_: Any) -> list[dict[str, Any]]:
    """The messages of one sample; without an annotation, only the question."""
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": query}]}]
    if annotation is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": annotation}]})
    return messages
