"""Ask a saved model its sample questions, as somebody would who has only transformers and the folder.

Run as a file; it does not import the package: `python demo/ask.py MODEL_FOLDER SAMPLES ANSWERS.json`.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(model_folder: str, samples_folder: str, answers_file: str, max_new_tokens: int = 64) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
    if "panorama_vlm" in sys.modules:
        raise RuntimeError("the package panorama_vlm was imported: this would not show that the folder stands alone")

    lines = Path(samples_folder, "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    answers = []
    for sample in tqdm([json.loads(line) for line in lines], desc="ask"):
        image = {"type": "image", "path": str(Path(samples_folder, sample["file_name"]))}
        question = {"role": "user", "content": [image, {"type": "text", "text": sample["query"]}]}
        inputs = processor.apply_chat_template(
            [question], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        words = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        answers.append(
            {
                "panorama": sample["file_name"],
                "question": sample["query"],
                "expected": sample["annotation"],
                "answer": processor.post_process_answer(words)[0].answer,
            }
        )
    Path(answers_file).write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask a saved model its sample questions, without the package.")
    for name in ("model_folder", "samples_folder", "answers_file"):
        parser.add_argument(name)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    main(**vars(parser.parse_args()))
