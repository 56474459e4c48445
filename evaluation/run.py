"""A run over all questions: on any number of processes, killed and started again as often as it happens.

Answers are written as they come, one line each, into a part file of each process. Which questions are asked together
follows from the questions and the batch size alone, so that a run that was stopped gives the bytes that it would have
given, whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ..train.checkpoint import write_whole
from ..train.fingerprint import differences
from .asking import Answerer, Asked, Said
from .items import Item
from .scores import PREDICTIONS, judge
from .turning import Variant, turned_item

RUN = "run.json"
_PARTS = "part-*.jsonl"
Judged = dict[tuple[str, str], dict[str, Any]]
Answers = Callable[[Iterable[Sequence[Asked]]], Iterator[list[Said]]]


def answer_items(
    items: Sequence[Item],
    model: Any,
    processor: Any,
    *,
    accelerator: Accelerator,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
    output: Path,
    variants: Sequence[Variant] = (Variant(),),
    settings: dict[str, Any] | None = None,
) -> Judged:
    """Ask a model all questions; on all processes.

    Args:
        items: the questions.
        model, processor: that belong together, the model where it is to run.
        accelerator: of this process.
        batch_size: questions that a process asks at once.
        max_new_tokens: of an answer, at most.
        blind: show a black panorama of the same size instead.
        output: folder for the answers; a run that was stopped there goes on.
        variants: how each panorama is shown.
        settings: what else decides the answers, for the check that a run goes on with the same.

    Returns:
        The judged answers by id and variant, as `predictions.jsonl` holds them.

    Raises:
        ValueError: where the folder holds answers of another model, other data or options; each difference is named.
    """
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "blind": blind}
    mark = {**model_mark(model), **options, **(settings or {})}
    answers = Answerer(model, processor, max_new_tokens, blind)
    return answer_with(answers, items, variants, accelerator, batch_size, Path(output), mark)


def answer_with(
    answers: Answers,
    items: Sequence[Item],
    variants: Sequence[Variant],
    accelerator: Accelerator,
    batch_size: int,
    output: Path,
    mark: dict[str, Any],
) -> Judged:
    """As `answer_items`, with anything that answers batches.

    Args:
        answers: gives the answers of each batch, in their order.
        items, variants, accelerator, batch_size, output: as there.
        mark: what decides the answers, by name.
    """
    asked = asks_of(items, variants)
    mark = {**mark, "questions": items_digest(items), "variants": ", ".join(sorted(v.name for v in variants))}
    problem = _open_folder(output, mark) if accelerator.is_main_process else None
    if problem := _from_main(problem, accelerator):
        raise ValueError(problem)
    said = _read(output)
    accelerator.wait_for_everyone()  # all have read the same, before anyone writes
    batches = [asked[first : first + batch_size] for first in range(0, len(asked), batch_size)]
    left = [batch for batch in batches if any(each.key not in said for each in batch)]
    own = left[accelerator.process_index :: accelerator.num_processes]
    with open(output / f"part-{accelerator.process_index:05d}.jsonl", "a", encoding="utf-8") as part:
        answered = tqdm(answers(own), "answers", len(own), unit="batch", disable=not accelerator.is_main_process)
        for batch, given in zip(own, answered, strict=True):
            for each, answer in zip(batch, given, strict=True):
                part.write(_line(each, answer))
                part.flush()
    accelerator.wait_for_everyone()
    said = _read(output)
    judged = {each.key: judged_line(each, said[each.key]) for each in asked}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_whole(output / PREDICTIONS, "".join(json.dumps(row) + "\n" for row in judged.values()))
        for path in output.glob(_PARTS):
            path.unlink()
    accelerator.wait_for_everyone()
    return judged


def asks_of(items: Sequence[Item], variants: Sequence[Variant]) -> list[Asked]:
    """Every question in every variant in which it can be asked, in an order that does not depend on theirs."""
    turned = ((turned_item(item, variant.heading), variant) for item in items for variant in variants)
    return sorted((Asked(item, variant) for item, variant in turned if item is not None), key=lambda each: each.key)


def judged_line(asked: Asked, said: Said) -> dict[str, Any]:
    """A line of `predictions.jsonl`: a judged answer; where there is none, it is wrong, and `error` says why."""
    row = {"variant": asked.variant.name, "item": item_digest(asked.item), **judge(asked.item, said.answer)}
    if said.steps:
        row["steps"] = said.steps
    if said.error is not None:
        row |= {"error": said.error, "right": None if row["right"] is None else False}
    return row


def items_digest(items: Sequence[Item]) -> str:
    """SHA-256 of questions and of what is right, whatever their order."""
    return hashlib.sha256("".join(sorted(item.id + item_digest(item) for item in items)).encode()).hexdigest()


def item_digest(item: Item) -> str:
    """Of one question: words, what is right, and which panorama."""
    fields = dataclasses.asdict(item)
    image = fields.pop("image")
    fields["image"] = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else Path(image).name
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_mark(model: Any) -> dict[str, Any]:
    """What tells a model from another: its name, its configuration, the size and some values of its weights."""
    name = str(getattr(model, "name_or_path", "") or "")
    config = model.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "_commit_hash", "_attn_implementation"):
        config.pop(key, None)
    sizes = {path.name: path.stat().st_size for path in sorted(Path(name).glob("*.safetensors"))} if name else {}
    with torch.no_grad():
        values = [each.flatten()[:: max(1, each.numel() // 16)][:16].float() for each in model.state_dict().values()]
    sample = torch.cat([each.cpu() for each in values]).numpy().tobytes()
    return {
        "model": os.path.realpath(name) if name and os.path.isdir(name) else name,
        "configuration": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "files of the weights": json.dumps(sizes),
        "weights": f"{model.num_parameters()}, {hashlib.sha256(sample).hexdigest()[:16]}",
    }


def _open_folder(output: Path, mark: dict[str, Any]) -> str | None:
    """Make a folder ready to go on in; what is wrong with it, in words."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / RUN
    if path.is_file():
        try:
            then = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{str(path)!r} cannot be read ({error}); choose another --output, or move the folder away"
        if changed := differences(then, json.loads(json.dumps(mark))):
            return (
                f"{str(output)!r} holds the answers of another run: {'; '.join(changed)}. Set it back to go on, or "
                "choose another --output"
            )
    elif (output / PREDICTIONS).exists() or any(output.glob(_PARTS)):
        return f"{str(output)!r} holds answers, but no {RUN} that says whose; choose another --output"
    else:
        write_whole(path, json.dumps(mark, indent=1, sort_keys=True) + "\n")
    for part in output.glob(_PARTS):  # a line that was being written when the run was killed
        data = part.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(part, data.rfind(b"\n") + 1)
    return None


def _from_main(value: Any, accelerator: Accelerator) -> Any:
    """What the main process has, on all of them."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def _line(asked: Asked, said: Said) -> str:
    fields = {"id": asked.item.id, "variant": asked.variant.name, "answer": said.answer}
    more = {"steps": said.steps, "error": said.error}
    return json.dumps({**fields, **{name: value for name, value in more.items() if value}}) + "\n"


def _read(output: Path) -> dict[tuple[str, str], Said]:
    """Every answer that is written in a folder."""
    said = {}
    for path in [output / PREDICTIONS, *sorted(output.glob(_PARTS))]:
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                said[row["id"], row["variant"]] = Said(row["answer"], row.get("error"), row.get("steps", ""))
    return said
