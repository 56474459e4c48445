"""A tokenizer of one's own spells everything, and what it was made for in few pieces."""

from __future__ import annotations

import json

import pytest
from panorama_vlm.synthetic.questions import STEP_WORDS
from panorama_vlm.train.config import CONFIGS
from panorama_vlm.train.tokenizer import main, train_tokenizer
from transformers import AutoTokenizer

TEXTS = ["Where is the small red ball?", "h41 - h3 = h38", "[-120, 14, 9, 20]", "A dog."] * 20
ODD = ["naïve café", "日本語 🙂", "a_b__c", "tabs\tand\n\nlines", "1234567890", "h264 and d4c", "\x00\x7f", "x" * 300]


@pytest.fixture(params=["of texts", "of the default model"])
def tokenizer(request):
    if request.param == "of texts":
        return train_tokenizer(TEXTS, 400)
    return AutoTokenizer.from_pretrained(CONFIGS / "tokenizer")


@pytest.mark.parametrize("text", ODD)
def test_any_text_is_spelled(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_are_told_one_by_one(tokenizer):
    pieces = tokenizer.tokenize("In 2026 there were 1234, [-150, 14]")
    assert not [piece for piece in pieces if sum(letter.isdigit() for letter in piece) > 1]


def test_the_default_one_holds_each_word_of_the_steps_in_one_piece_and_steps_survive_decoding():
    tokenizer = AutoTokenizer.from_pretrained(CONFIGS / "tokenizer")
    common = [word for word in STEP_WORDS if word[0] == "h"]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in common)
    assert all(len(tokenizer.tokenize(f" {word}")) == 1 for word in common)
    ids = tokenizer("<think>h1 - h2 = h71</think>left", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>h1 - h2 = h71</think>left"


def test_the_chat_ends_answers_alone(tokenizer):
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>A?<|assistant|>B<|end|>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>A?<|assistant|>"


def test_the_command_reads_a_source_and_says_what_is_wrong(tmp_path, capsys):
    rows = [{"file_name": "a.jpg", "query": "Where?", "annotation": f"<think>h{n}</think>left"} for n in range(30)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from PIL import Image

    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg")
    main([str(tmp_path), "--pieces", "310", "--samples", "5", "--output", str(tmp_path / "out")])
    assert "pieces in" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("left</think>")[-1] == "</think>"
    for wrong, words in (([str(tmp_path), "--pieces", "100"], "at least 300"), (["/no/such"], "no such file")):
        with pytest.raises(SystemExit):
            main([*wrong, "--output", str(tmp_path / "other")])
        assert words in capsys.readouterr().err
