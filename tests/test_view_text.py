"""Words around the views of a panorama: which way each looks, and the control tokens of a pretrained model."""

from __future__ import annotations

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaProcessor, PanoramaVLM, View
from panorama_vlm.geometry_panorama import view_words
from PIL import Image

WORDS = {"view_text": "{direction} ({yaw}, {pitch}): ", "view_suffix": ";", "view_strategy": "cubemap"}
SAID = ["front (0, 0): ", "right (90, 0): ", "back (-180, 0): ", "left (-90, 0): ", "up (0, 90): ", "down (0, -90): "]


def told(processor, ids):
    """A row of ids in words, with the number of placeholders in the place of each run of them."""
    text, run = "", 0
    for token in [*ids.tolist(), None]:
        if token == processor.image_token_id:
            run += 1
            continue
        text += f"<{run}>" if run else ""
        run = 0
        text += "" if token is None else processor.tokenizer.decode([token])
    return text


def chat(image, words="where?", answer=None, **part):
    content = [{"type": "image", "image": image, **part}, {"type": "text", "text": words}]
    asked = [{"role": "user", "content": content}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


@pytest.fixture
def partial(tmp_path, panoramas):
    """A file that shows the front half of a sphere."""
    path = tmp_path / "half.png"
    panoramas[1].crop((128, 0, 384, 256)).save(path)
    return Image.open(path)


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (View("erp"), "panorama"),
        (View("perspective", 22, 0, 90), "front"),
        (View("perspective", 23, 0, 90), "front right"),
        (View("perspective", 180, 0, 90), "back"),
        (View("perspective", -180, 0, 90), "back"),
        (View("perspective", 315, 0, 90), "front left"),
        (View("erp", -90, 0, 90), "left"),
        (View("perspective", 90, 45, 90), "upper right"),
        (View("perspective", 0, -45, 90), "lower front"),
        (View("perspective", 30, 80, 90), "up"),
        (View("perspective", 0, -90, 90), "down"),
    ],
)
def test_a_view_is_called_after_the_eighth_of_the_horizon_it_looks_to(view, said):
    assert view_words(view, "{direction}") == said
    assert view_words(view, None) == ""


def test_words_stand_around_each_view_and_are_no_placeholders(make, ask, panoramas):
    model, processor = make(**WORDS)
    inputs = ask(processor, panoramas[0])
    each = model.config.image_tokens_per_view
    expected = "".join(f"{words}<{count}>;" for words, count in zip(SAID, each, strict=True))
    assert expected in told(processor, inputs["input_ids"][0])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens == sum(each)
    assert model(**inputs).logits.isfinite().all()
    words = processor.tokenizer.encode("".join(f"{words}{processor.image_token};" for words in SAID))
    assert processor.num_tokens_with_words == sum(each) + len(words) - len(SAID)
    plain, without = make(view_strategy="cubemap")
    assert without.num_tokens_with_words == without.num_image_tokens
    assert plain.config.view_text is None and not without.has_view_words
    assert f"<{sum(each)}>" in told(without, ask(without, panoramas[0])["input_ids"][0])


def test_training_reads_what_generation_reads_and_teaches_the_answer_alone(make, panoramas):
    _, processor = make(**WORDS)
    messages = chat(panoramas[0], answer="a bridge")
    taught = processor.apply_chat_template([messages], return_labels=True)
    asked = processor.apply_chat_template(
        [messages[:1]], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert torch.equal(taught["input_ids"][:, : asked.shape[1]], asked)
    supervised = taught["labels"][0] != -100
    assert supervised.nonzero()[0, 0] == asked.shape[1]
    said = processor.tokenizer.decode(taught["labels"][0][supervised])
    assert said.strip().startswith("a bridge") and "front" not in said


def test_partial_and_whole_panoramas_of_a_batch_say_what_they_show(make, panoramas, partial):
    model, processor = make(**WORDS)
    messages = [chat(partial), chat(panoramas[0])]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, padding=True, **options)
    kept = inputs["view_mask"].tolist()
    assert kept[0][0] and not kept[0][2] and all(kept[1])
    for row, mask in zip(inputs["input_ids"], kept, strict=True):
        text = told(processor, row)
        assert [words in text for words in SAID] == mask
    alone = processor.apply_chat_template(messages[0], **options)
    with torch.no_grad():
        expected = model(**alone).logits[0, -1]
        torch.testing.assert_close(model(**inputs).logits[0, -1], expected, rtol=1e-4, atol=1e-4)
    taught = processor.apply_chat_template(
        [chat(partial, answer="yes"), chat(panoramas[0], answer="no")], return_labels=True
    )
    assert model(**taught).loss.isfinite()
    assert torch.equal(taught["input_ids"][0][: alone["input_ids"].shape[1]], alone["input_ids"][0])


def test_further_views_are_called_too_and_a_chat_holds_several_panoramas(make, panoramas):
    model, processor = make(**WORDS)
    content = [
        *chat(panoramas[0], further_views=[(100, 0, 40)])[0]["content"],
        *chat(panoramas[1], "and?")[0]["content"],
    ]
    messages = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options)
    text = told(processor, inputs["input_ids"][0])
    assert (
        f"{SAID[5]}<{model.config.image_tokens_per_view[5]}>;right (100, 0): <{model.config.tokens_per_view}>;" in text
    )
    assert text.count("right (100, 0)") == 1 and text.count(SAID[0]) == 2
    assert model(**inputs).logits.isfinite().all()
    taught = processor.apply_chat_template([[*messages, {"role": "assistant", "content": "x"}]], return_labels=True)
    assert torch.equal(taught["input_ids"][:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_the_words_of_views_are_not_those_of_the_text(make, panoramas):
    _, processor = make(**WORDS)
    messages = chat(panoramas[0], answer="a bridge")
    processor.max_text_length = 30
    assert processor.apply_chat_template([messages], return_labels=True)["input_ids"].shape[1] > 60
    processor.max_text_length = 5
    with pytest.raises(ValueError, match="too long: 2[0-9] text tokens|too long: 1[0-9] text tokens"):
        processor.apply_chat_template([messages], return_labels=True)


def test_packed_questions_share_the_views_and_their_words(make, panoramas):
    model, processor = make(**WORDS)
    chats = [chat(panoramas[0], words, answer) for words, answer in (("where?", "here"), ("what is behind?", "water"))]
    packed = processor.pack_conversations(chats)
    text = told(processor, packed["input_ids"][0])
    assert all(text.count(words) == 1 for words in SAID)
    losses = []
    with torch.no_grad():
        together = model(**packed).ar_loss
        for each in chats:
            alone = processor.apply_chat_template([each], return_labels=True)
            losses.append((model(**alone).ar_loss, int((alone["labels"] != -100).sum())))
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_the_default_prompt_has_them(make, panoramas, partial):
    model, processor = make(**WORDS)
    inputs = processor.image_processor([partial, panoramas[0]], return_tensors="pt")
    with pytest.warns(UserWarning, match="asking the default prompt"):
        ids, _ = model._default_prompt(inputs["pixel_values"], processor.tokenizer, inputs["view_mask"])
    assert [words in told(processor, ids[0]) for words in SAID] == inputs["view_mask"][0].tolist()
    assert all(words in told(processor, ids[1]) for words in SAID)


def test_they_are_saved_with_both(make, ask, panoramas, tmp_path):
    model, processor = make(**WORDS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = PanoramaProcessor.from_pretrained(tmp_path)
    assert torch.equal(ask(again, panoramas[0])["input_ids"], ask(processor, panoramas[0])["input_ids"])
    config = PanoramaConfig.from_pretrained(tmp_path)
    assert (config.view_text, config.view_suffix) == (WORDS["view_text"], WORDS["view_suffix"])


def test_what_cannot_be_said_is_refused(make):
    with pytest.raises(ValueError, match=r"view_text may hold \{direction\}, \{yaw\} and \{pitch\}, got '\{up\}'"):
        make(view_text="{up}")
    with pytest.raises(ValueError, match="panorope.*put words between them"):
        make(position_encoding="panorope", view_text="{direction}: ")
    _, processor = make()
    with pytest.raises(ValueError, match="need image_tokens_per_view"):
        PanoramaProcessor(processor.image_processor, processor.tokenizer, view_text="{direction}: ")
    config = make(**WORDS)[0].config
    config.text_config._attn_implementation, config.image_token_id = "vllm", 0
    with pytest.raises(ValueError, match="a serving engine expects the tokens of a panorama side by side"):
        PanoramaVLM._from_config(config)
