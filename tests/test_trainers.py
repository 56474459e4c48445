"""The trainers and adapters that people bring along, as `docs/trainers.md` shows them."""

import re
from pathlib import Path

import pytest
import torch
from panorama_vlm import PanoramaVLM
from peft import LoraConfig, PeftModel, get_peft_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/trainers.md"
LAYERS = ".*language_model.*(q_proj|v_proj)"


def test_the_page_of_trainers_does_what_it_says(make, ask, panoramas, tmp_path, monkeypatch):
    model, processor = make(use_lora=True)
    model.save_pretrained(tmp_path / "build/demo/model")
    processor.save_pretrained(tmp_path / "build/demo/model")
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    assert names["trainer"].state.global_step == 3
    trained = PanoramaVLM.from_pretrained("build/trainer/model")
    assert not trained.has_lora
    inputs = ask(processor, panoramas[0])
    with torch.no_grad():
        torch.testing.assert_close(trained(**inputs).logits, names["model"].eval()(**inputs).logits)
        assert not torch.equal(trained(**inputs).logits, model(**inputs).logits)
    exec(blocks[1], names)
    adapted = names["adapted"]
    assert adapted.active_adapter == "outdoors"
    training = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert training and all("outdoors" in name for name in training)
    assert any("magnitude" in name for name in training)  # DoRA


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["projection"]}])
def test_adapters_train_save_and_merge(make, ask, panoramas, tmp_path, options):
    model, processor = make()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LAYERS, **options))
    inputs = ask(processor, panoramas[0])
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = adapted(**inputs).logits
        loaded = PeftModel.from_pretrained(PanoramaVLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**inputs).logits, wanted)
        merged = loaded.merge_and_unload()
        assert isinstance(merged, PanoramaVLM)
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def test_adapters_are_switched_on_a_loaded_model(make, ask, panoramas):
    model, processor = make()
    inputs = ask(processor, panoramas[0])
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        bare = model(**inputs).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=LAYERS, init_lora_weights=False), "one").eval()
        adapted.add_adapter("two", LoraConfig(target_modules=LAYERS, init_lora_weights=False))
        said = {}
        for name in ("one", "two"):
            adapted.set_adapter(name)
            said[name] = adapted(**inputs).logits
            adapted.generate(**inputs, **options)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**inputs).logits, bare)
        adapted.set_adapter("one")
        torch.testing.assert_close(adapted(**inputs).logits, said["one"], rtol=0, atol=0)
        assert not torch.allclose(said["one"], said["two"])
