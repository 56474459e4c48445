import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from panorama_vlm import PanoramaConfig
from panorama_vlm.benchmarks import ablation
from panorama_vlm.benchmarks.ablation import DATA, GROUPS, KINDS, VARIANTS, change, configuration, write_scenes
from panorama_vlm.synthetic import cutouts, questions
from panorama_vlm.synthetic.write import METADATA, parse_world
from panorama_vlm.train.config import load_config
from safetensors.torch import load_file


@pytest.fixture
def learned(make, tmp_path):
    """A model's folder, whose weights are none that a start gives."""
    model, processor = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_has_the_same_budget_and_only_what_starts_anew_has_other_weights(name, learned, tmp_path):
    variant = VARIANTS[name]
    written, stages = configuration(name, 3, panoramas=1200, workers=1)
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(written))
    config = load_config([str(tmp_path / "ablation.yaml"), "--model", str(learned)])
    seen = {stage: getattr(config, stage).max_steps * getattr(config, stage).batch_size for stage in stages}
    assert sum(seen.values()) == 1200 and stages[-1] == "finetune" and config.seed == 3
    assert config.finetune.optimizer == ("adamw" if "AdamW" in name else "muon")
    assert ("vision" in stages) == (variant.stage_1 is not None)
    model, processor = change(str(learned), variant, 3)
    assert processor.num_image_tokens == model.config.num_image_tokens
    before = load_file(learned / "model.safetensors")
    now = model.state_dict()
    other = {key for key in now if key in before and not torch.equal(now[key], before[key])}
    assert all(any(f".{part}." in key for part in variant.anew) for key in other)
    assert all(any(f".{part}." in key for key in other) for part in variant.anew)
    left_out = {key for key in before if key not in now} - {"lm_head.weight"}
    assert left_out == ({"model.projection.ray.weight"} if name == "no position code" else set())


def test_each_kind_that_is_asked_is_taught():
    assert len(set(KINDS)) == sum(map(len, GROUPS.values())) and set(KINDS) <= set(questions.KINDS)
    _, world = parse_world(DATA.format(tables=1))
    assert set(questions.read_weights(world.kinds, tuple(questions.KINDS), "kinds")) == set(KINDS)


def test_scenes_ask_every_kind_and_of_the_seam_as_often_as_there_are_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(cutouts, "find_font", lambda: None)
    folder = write_scenes(tmp_path, 6)
    rows = [yaml.safe_load(line) for line in (folder / METADATA).read_text().splitlines()]
    asked = [kind for row in rows for kind in row["kinds"]]
    assert asked.count("adjacent_across_seam") == 6 and set(asked) == set(KINDS)
    assert all((folder / row["file_name"]).is_file() for row in rows)


def test_a_model_that_has_learned_is_changed_and_what_is_done_is_not_done_again(learned, tmp_path, monkeypatch):
    called, started = [], []

    def call(options, module, *arguments):
        called.append(module)
        if module.endswith("evaluation"):
            results = Path(arguments[arguments.index("--output") + 1])
            results.mkdir()
            kinds = {kind: {"accuracy": 0.5 + 0.1 * ("finetune" in str(results))} for kind in KINDS}
            (results / "metrics.json").write_text(json.dumps({"kinds": kinds}))
        else:
            named = dict(zip(arguments[1::2], arguments[2::2], strict=True))
            started.append((named["--stage"], named.get("--model")))
            shutil.copytree(Path(named["--output"], "moved"), Path(named["--output"], named["--stage"]))

    monkeypatch.setattr(ablation, "_call", call)
    monkeypatch.setattr(ablation, "costs", lambda *_: {"image tokens": 9, "tower ms": 1.0, "language model ms": 2.0})
    own = ["--model", str(learned), "--scenes", "1", "--output", str(tmp_path / "out")]
    taught = "resampler anew, stage 1: labels alone"
    own += ["--variants", "cubemap", taught]
    monkeypatch.setenv(cutouts.VARIABLE, "")
    ablation.main(own)
    asked, trained = "panorama_vlm.evaluation", "panorama_vlm.train"
    assert called == [asked, trained, asked, trained, trained, asked]  # what starts anew is not asked as it is
    folders = [tmp_path / "out" / f"{name}-1200-0" for name in ("cubemap", "resampler-anew-stage-1-labels-alone")]
    moved = [str(folder / "moved") for folder in folders]
    assert started == [("finetune", moved[0]), ("vision", moved[1]), ("finetune", moved[1])]
    rows = json.loads((tmp_path / "out/ablation.json").read_text())
    assert rows["cubemap"]["as it is"] == [0.5] and rows["cubemap"]["seam"] == [0.6]
    assert rows[taught]["as it is"] == [None] and rows[taught]["seam"] == [0.6]
    config = PanoramaConfig.from_pretrained(moved[0])
    assert config.view_strategy == "cubemap" and config.token_selection == "owned"
    assert (tmp_path / "out/ablation.png").is_file()
    ablation.main(own)
    assert len(called) == 6
    with pytest.raises(SystemExit, match="holds a run with other options"):
        ablation.main([*own, "--workers", "1"])
    shutil.copytree(learned, tmp_path / "other")
    with pytest.raises(SystemExit, match="holds a run with other options"):
        ablation.main([*own, "--model", str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        ablation.main([*own, "--panoramas", "31"])
