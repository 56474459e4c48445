"""Ask a model about a panorama: `python -m panorama_vlm.ask MODEL PANORAMA "question"`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .modeling_panorama import PanoramaVLM
from .processing_panorama import PanoramaProcessor, split_steps


def answer(
    model: PanoramaVLM,
    processor: PanoramaProcessor,
    messages: list[dict[str, Any]],
    max_new_tokens: int = 64,
    **options: Any,
) -> str:
    """What the model says next in a conversation, decoded greedily; the answer without the steps before it.

    Args:
        model, processor: that belong together.
        messages: as for `processor.apply_chat_template`; the last one is the user's.
        max_new_tokens: of the answer, at most.
        options: for `generate`.

    Raises:
        ValueError: for a panorama that cannot be read, or messages that the chat template refuses.
    """
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    ).to(model.device)
    options = {"do_sample": False, "return_dict_in_generate": True, "tokenizer": processor.tokenizer, **options}
    output: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    return split_steps(output.text[0]).answer


def question(panorama: Any, words: str) -> list[dict[str, Any]]:
    """The messages of one question about one panorama."""
    parts = [{"type": "image", "image": panorama}, {"type": "text", "text": words}]
    return [{"role": "user", "content": parts}]


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.ask", description="Ask a model about a panorama; the answer is printed."
    )
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("panorama", help="file of an equirectangular image")
    parser.add_argument("question", nargs="+", help="words of the question")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of the answer, at most (default: 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    try:
        load = PanoramaVLM.from_checkpoint if Path(options.model).is_dir() else PanoramaVLM.from_pretrained
        model = load(options.model)
        processor = PanoramaProcessor.from_pretrained(options.model)
        messages = question(options.panorama, " ".join(options.question))
        words = answer(model.eval().to(options.device), processor, messages, options.max_new_tokens)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    print(words)


if __name__ == "__main__":
    main()
