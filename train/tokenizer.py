"""A small tokenizer of one's own: `python -m panorama_vlm.train.tokenizer SOURCE --output FOLDER`.

For a language model that starts from random weights: byte-level BPE (Sennrich et al. 2016) trained on the texts of a
source, so that it spells any text, with digits one by one (numbers are then told digit by digit, and none is unknown).
That of `default_model.yaml`, in `configs/tokenizer/`, comes from

    python -m panorama_vlm.train.tokenizer "synthetic://?scenes=1000&seed=7&width=64&questions=21&tables=8&steps=true" \
        --samples 1000 --pieces 1280 --output train/configs/tokenizer
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from ..configuration_panorama import IMAGE_TOKEN
from ..data.samples import open_data
from ..data.sources import DataSource
from ..processing_panorama import STEPS

PAD, USER, ASSISTANT, SYSTEM, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_CODE = r" ?[hpdm]-?\d+"  # headings, pitches, distances and metres of the steps: one piece each
_WORDS = rf"{_CODE}| ?\d| ?[^\W\d_]+| ?[^\s\w]+|_+|\s+"


def train_tokenizer(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template of its own.

    Args:
        texts: to learn from.
        pieces: of the vocabulary, special tokens included; at least 300 (256 bytes and the special tokens).

    Raises:
        ValueError: for fewer pieces.
    """
    if pieces < 300:
        raise ValueError(
            f"pieces must be at least 300, for bytes and special tokens, got {pieces}. Typical value: 1024"
        )
    special = [PAD, END, USER, ASSISTANT, SYSTEM, IMAGE_TOKEN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces - len(STEPS),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in STEPS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = TEMPLATE
    return fast


def texts_of(source: DataSource, samples: int) -> Iterator[str]:
    """The texts of the first samples of a source, those of steps and answers apart."""
    train, _ = open_data([source], stage="finetune", seed=0)
    for sample in tqdm(itertools.islice(train, samples), total=samples, desc="texts"):
        for message in itertools.chain(sample.get("messages", []), *sample.get("further", [])):
            for part in message["content"]:
                if part["type"] == "text":
                    yield from filter(None, re.split("|".join(map(re.escape, STEPS)), part["text"]))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a tokenizer on the texts of a source.")
    parser.add_argument("source", help="as `data` of the trainer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--pieces", type=int, default=1024, help="of the vocabulary")
    parser.add_argument("--samples", type=int, default=3000, help="of the source that are read")
    options = parser.parse_args(arguments)
    try:
        tokenizer = train_tokenizer(texts_of(DataSource(options.source), options.samples), options.pieces)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    tokenizer.save_pretrained(options.output)
    print(f"{len(tokenizer)} pieces in {options.output}")


if __name__ == "__main__":
    main()
