"""TRL trains a saved folder, as its users do: without the package, with `trust_remote_code=True`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools
SAMPLES = Path(__file__).resolve().parent.parent / "samples"

SFT = """
import json, sys
from pathlib import Path

import torch
from datasets import Dataset, Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

folder, samples, output = sys.argv[1:4]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
rows = [json.loads(line) for line in Path(samples, "metadata.jsonl").read_text().splitlines()][:6]
data = Dataset.from_list(
    [
        {
            "images": [str(Path(samples, row["file_name"]))],
            "prompt": [{"role": "user", "content": row["query"]}],
            "completion": [{"role": "assistant", "content": row["annotation"]}],
        }
        for row in rows
    ]
).cast_column("images", [Image()])
pairs, fused = [], []


class Compared(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            ours = model(**dict(inputs), num_items_in_batch=num_items_in_batch).loss
        theirs = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        loss = theirs[0] if return_outputs else theirs
        supervised = processor.tokenizer.decode(inputs["labels"][0][inputs["labels"][0] != -100])
        pairs.append((ours.item(), loss.item(), supervised))
        return theirs


backbone = model.base_model.forward
model.base_model.forward = lambda *args, **kwargs: fused.append("labels" not in kwargs) or backbone(*args, **kwargs)
options = SFTConfig(
    output, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, report_to="none",
    use_cpu=True, max_length=None, save_strategy="no", bf16=False, gradient_checkpointing=False,
)
trainer = Compared(model, options, train_dataset=data, processing_class=processor)
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
trainer.train()
changed = sum(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
assert "panorama_vlm" not in sys.modules
print(json.dumps({"pairs": pairs, "changed": changed, "backbone": len(fused)}))
"""


DPO = """
import json, sys
from pathlib import Path

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

folder, samples, output = sys.argv[1:4]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
rows = [json.loads(line) for line in Path(samples, "metadata.jsonl").read_text().splitlines()][:4]
data = Dataset.from_list(
    [
        {
            "images": [str(Path(samples, row["file_name"]))],
            "prompt": [{"role": "user", "content": row["query"]}],
            "chosen": [{"role": "assistant", "content": row["annotation"]}],
            "rejected": [{"role": "assistant", "content": "I do not know."}],
        }
        for row in rows
    ]
).cast_column("images", [Image()])
options = DPOConfig(
    output, max_steps=8, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1, report_to="none",
    use_cpu=True, max_length=None, save_strategy="no", bf16=False, gradient_checkpointing=False, beta=0.5,
)
adapter = LoraConfig(r=4, target_modules=".*language_model.*(q_proj|v_proj)", task_type="CAUSAL_LM")
trainer = DPOTrainer(model, args=options, train_dataset=data, processing_class=processor, peft_config=adapter)
shown = next(iter(trainer.get_train_dataloader()))
trainer.train()
history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
print(json.dumps({
    "loss": [entry["loss"] for entry in history],
    "margins": [entry["rewards/margins"] for entry in history],
    "panoramas": len(shown["pixel_values"]), "rows": len(shown["input_ids"]),
}))
"""


def run_script(script, make, tmp_path):
    """The last line that a script prints, which is given a saved folder, the samples and a folder for its output."""
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    file = tmp_path / "script.py"
    file.write_text(script)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), str(tmp_path / "model"), str(SAMPLES), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_dpo_trainer_prefers_what_was_chosen(make, tmp_path):
    found = run_script(DPO, make, tmp_path)
    assert found["rows"] == found["panoramas"] == 4  # chosen and rejected, each with its panorama
    assert found["loss"][0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the adapted model is still the reference
    assert found["loss"][-1] < 0.5 and found["margins"][-1] > 0.5


def test_sft_trainer_trains_a_saved_folder_with_our_losses(make, tmp_path):
    found = run_script(SFT, make, tmp_path)
    assert len(found["pairs"]) == 3 and found["changed"] > 20 and found["backbone"] >= 3
    answers = [json.loads(line)["annotation"] for line in (SAMPLES / "metadata.jsonl").read_text().splitlines()]
    for ours, theirs, supervised in found["pairs"]:
        assert abs(ours - theirs) < 1e-5 * max(1, ours)
        assert any(answer in supervised for answer in answers)
    losses = [ours for ours, _, _ in found["pairs"]]
    assert losses[-1] != losses[0]
