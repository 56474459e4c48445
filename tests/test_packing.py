"""Questions packed into one row are taught as if each were alone."""

from __future__ import annotations

import pytest
import torch
from panorama_vlm.data.collators import ConversationCollator
from panorama_vlm.data.rows import messages_of
from panorama_vlm.stages_panorama import STAGES
from panorama_vlm.tests.test_language_heads import small
from panorama_vlm.train.build import check_packing
from PIL import Image

QUESTIONS = [("What is there?", "A red ball."), ("How many?", "two"), ("Where is the cone?", "left")]


def sample(further=()):
    turns = [
        {"from": speaker, "value": text}
        for pair in QUESTIONS
        for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
    image = Image.effect_noise((128, 64), 60).convert("RGB")
    table = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for pair in further
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": messages_of(turns, [image]), "further": [table] if table else [], "index": 0}, image


@pytest.mark.parametrize(("attention", "encoding"), [("sdpa", "rays"), ("eager", "rays"), ("sdpa", "panorope")])
def test_packed_logits_and_loss_are_those_of_rows_of_their_own(make, attention, encoding):
    model, processor = make(position_encoding=encoding)
    model.set_attn_implementation(attention)
    raw, image = sample(further=[("Ball?", "red"), ("Cone?", "blue")])
    packed = ConversationCollator(processor, independent=1.0)([raw])
    assert packed["attention_mask"].shape == (1, 1, *[packed["input_ids"].shape[1]] * 2)
    model.eval()
    with torch.no_grad():
        together = model(**packed, return_logits=True)
    rows = [[pair] for pair in QUESTIONS] + [[("Ball?", "red"), ("Cone?", "blue")]]
    total, count, found = 0.0, 0, []
    for pairs in rows:
        messages = []
        for number, (question, answer) in enumerate(pairs):
            parts = [{"type": "text", "text": question}]
            parts = [{"type": "image", "image": image}, *parts] if number == 0 else parts
            messages += [{"role": "user", "content": parts}]
            messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        alone = processor.apply_chat_template([messages], return_labels=True)
        with torch.no_grad():
            output = model(**alone, return_logits=True)
        supervised = alone["labels"][0] != -100
        found.append(output.logits[0][torch.cat([supervised[1:], supervised[:1]])])
        total += float(output.ar_loss) * int(supervised.sum())
        count += int(supervised.sum())
    supervised = packed["labels"][0] != -100
    assert int(supervised.sum()) == count
    logits = together.logits[0][torch.cat([supervised[1:], supervised[:1]])]
    torch.testing.assert_close(logits, torch.cat(found), rtol=1e-4, atol=1e-4)
    assert float(together.ar_loss) == pytest.approx(total / count, rel=1e-4)


def test_packed_and_ordinary_rows_are_one_batch(make):
    model, processor = make()
    raw, _ = sample()
    other = {**raw, "index": 1}
    packed, ordinary = (ConversationCollator(processor, independent=share)([raw]) for share in (1.0, 0.0))
    mixed = ConversationCollator(processor, independent=0.5, seed=_seed_that_differs())([raw, other])
    assert mixed["attention_mask"].ndim == 4 and len(mixed["input_ids"]) == 2
    model.eval()
    with torch.no_grad():
        each = [model(**batch).ar_loss for batch in (packed, ordinary)]
        both = model(**mixed)
    counts = [int((batch["labels"] != -100).sum()) for batch in (packed, ordinary)]
    expected = sum(float(loss) * count for loss, count in zip(each, counts, strict=True)) / sum(counts)
    assert float(both.ar_loss) == pytest.approx(expected, rel=1e-4)


def _seed_that_differs() -> int:
    import numpy as np

    draws = {s: [np.random.default_rng((s, 0, i, 2)).random() < 0.5 for i in (0, 1)] for s in range(50)}
    return next(seed for seed, (first, second) in draws.items() if first and not second)


def test_attention_without_such_masks_says_so(make):
    model, processor = make()
    raw, _ = sample()
    packed = ConversationCollator(processor, independent=1.0)([raw])
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="sdpa"):
        model(**packed)


def test_other_panoramas_cannot_be_packed(make):
    _, processor = make()
    raw, image = sample()
    alone = [{"role": "user", "content": [{"type": "text", "text": "Hm?"}]}, raw["messages"][1]]
    with pytest.raises(ValueError, match="same panorama"):
        processor.pack_conversations([raw["messages"], alone])
    processor.max_text_length = 20
    with pytest.raises(ValueError, match="too long"):
        processor.pack_conversations([raw["messages"][:2]] * 3)


def test_stage_vision_asks_nothing():
    from panorama_vlm.train.config import load_config

    assert STAGES[0] == "vision"
    with pytest.raises(ValueError, match="independent_questions must be 0: stage vision asks nothing"):
        load_config(["tiny.yaml", "--vision.independent_questions", "0.5"])
    with pytest.raises(ValueError, match=r"finetune.independent_questions must be in \[0, 1\], got 1.5"):
        load_config(["tiny.yaml", "--finetune.independent_questions", "1.5"])


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "nemotron_h", "recurrent_gemma"])
def test_language_models_that_carry_on_more_than_attention_are_refused(make, family):
    """Their states and convolutions reach from one question into the next, whatever the mask says."""
    model, _ = make(language=small(family).to_dict())
    with pytest.raises(ValueError, match=f"of type {family!r} questions of one row would see each other"):
        check_packing(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_language_models_of_attention_are_not(make, family, attention):
    model, _ = make(language=small(family).to_dict())
    model.set_attn_implementation(attention)
    check_packing(model)


def test_layers_that_see_less_than_a_sample_are_refused(make):
    config = small("gemma3_text").to_dict() | {"sliding_window": 64}
    model, _ = make(language=config, max_text_length=32)
    with pytest.raises(ValueError, match="see 64 positions, where a sample has up to"):
        check_packing(model)


def test_what_cannot_be_packed_is_said_once_and_taught_as_a_conversation(make):
    _, processor = make()
    raw, _ = sample()
    question, *others = raw["messages"]
    late = {**raw, "messages": [{**question, "content": question["content"][::-1]}, *others]}
    collate = ConversationCollator(processor, independent=1.0)
    with pytest.warns(UserWarning, match="taught as one conversation") as caught:
        batch = collate([late])
        collate([late])
    assert batch["attention_mask"].ndim == 2 and len(caught) == 1
