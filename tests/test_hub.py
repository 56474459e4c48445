"""A saved folder stands alone: it loads where the package is not installed, and what was loaded saves again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

# Runs without the package and OpenCV: refuses to import them, loads the folder, answers, and saves what it loaded.
ELSEWHERE = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if (top := name.split(".")[0]) in ("panorama_vlm", "cv2", "simplejpeg"):
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

sys.meta_path.insert(0, NoPackage())
import json
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

folder, auto_class, picture, result, again = sys.argv[1:]
model = globals()[auto_class].from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "location"}]}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
)
again_views = image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
assert (again_views == inputs["pixel_values"]).all()
save_file({"logits": model(**inputs).logits, "answer": model.generate(**inputs, max_new_tokens=4)}, result)
model.save_pretrained(again)
processor.save_pretrained(again)
print(json.dumps([type(part).__module__.split(".")[0] for part in (model, processor, image_processor, model.config)]))
"""


@pytest.fixture
def saved(make, ask, tmp_path, panoramas, monkeypatch):
    """A folder, a picture, and the logits and the answer of the model that was saved."""
    monkeypatch.setattr("panorama_vlm.sampling_panorama.cv2", None)  # as where the folder is loaded
    model, processor = make(default_generation_prompt="Say what you see.")
    picture = tmp_path / "panorama.png"
    panoramas[0].save(picture)
    inputs = ask(processor, str(picture))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits, "answer": model.generate(**inputs, max_new_tokens=4)}
    return tmp_path / "saved", picture, expected


def load_elsewhere(folder, auto_class, picture, tmp_path, name):
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    result, again = tmp_path / f"{name}.safetensors", tmp_path / name
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / f"modules_{name}"), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, str(script), str(folder), auto_class, str(picture), str(result), str(again)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == ["transformers_modules"] * 4
    return load_file(result), again


@pytest.mark.slow
def test_a_folder_loads_where_the_package_cannot_be_imported_and_saves_a_second_and_third_generation(saved, tmp_path):
    folder, picture, expected = saved
    for name, auto_class in [
        ("second", "AutoModel"),
        ("third", "AutoModelForImageTextToText"),
        ("fourth", "AutoModelForCausalLM"),
    ]:
        result, folder = load_elsewhere(folder, auto_class, picture, tmp_path, name)
        assert torch.equal(result["logits"], expected["logits"])
        assert torch.equal(result["answer"], expected["answer"])


def test_where_the_package_is_installed_its_own_classes_load_the_folder(saved):
    folder, _, _ = saved
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(folder)) is PanoramaVLM
    assert type(AutoProcessor.from_pretrained(folder)) is PanoramaProcessor


def test_the_pipeline_of_transformers_answers(saved):
    folder, picture, expected = saved
    answer = pipeline("image-text-to-text", model=str(folder), processor=str(folder), dtype=torch.float32)
    messages = [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "location"}]}
    ]
    output = answer(text=messages, max_new_tokens=4, return_full_text=False)
    processor = AutoProcessor.from_pretrained(folder)
    prompt_length = expected["logits"].shape[1]
    words = processor.batch_decode(expected["answer"][:, prompt_length:], skip_special_tokens=True)[0]
    assert output[0]["generated_text"] == words


def test_the_code_of_a_folder_needs_nothing_but_pil_and_what_transformers_needs(saved):
    from transformers.dynamic_module_utils import get_imports

    folder, _, _ = saved
    allowed = {"torch", "transformers", "numpy", "safetensors", "PIL", *sys.stdlib_module_names}
    for file in folder.glob("*.py"):
        assert set(get_imports(file)) <= allowed, file.name


def test_weights_of_another_shape_are_refused(saved, tmp_path):
    folder, _, _ = saved
    weights = load_file(folder / "model.safetensors")
    weights["model.projection.ray.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="projection.ray.weight|size mismatch|ignore_mismatched"):
        PanoramaVLM.from_pretrained(folder)
