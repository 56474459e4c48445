import json
import shutil
from pathlib import Path

import pytest
import yaml
from panorama_vlm import PanoramaConfig
from panorama_vlm.benchmarks import ablation
from panorama_vlm.benchmarks.ablation import BATCH, DATA, GROUPS, KINDS, VARIANTS, configuration, write_scenes
from panorama_vlm.synthetic import cutouts, questions
from panorama_vlm.synthetic.write import METADATA, parse_world
from panorama_vlm.train.build import compose
from panorama_vlm.train.config import load_config


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_composes_with_the_same_budget(name, tmp_path):
    written, stages = configuration(name, 3, panoramas=1200, workers=1)
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(written))
    config = load_config([str(tmp_path / "ablation.yaml")])
    model, processor = compose(config.compose, config.options)
    assert processor.num_image_tokens == model.config.num_image_tokens
    seen = {stage: getattr(config, stage).max_steps * getattr(config, stage).batch_size for stage in stages}
    assert sum(seen.values()) == 1200 and stages[-1] == "finetune"
    assert config.finetune.batch_size == BATCH and config.seed == 3


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


def test_a_model_that_has_learned_is_moved_and_what_is_done_is_not_done_again(make, tmp_path, monkeypatch):
    for part in make():
        part.save_pretrained(tmp_path / "model")
    called = []

    def call(options, module, *arguments):
        called.append(module)
        if module.endswith("evaluation"):
            results = Path(arguments[arguments.index("--output") + 1])
            results.mkdir()
            kinds = {kind: {"accuracy": 0.5 + 0.1 * ("finetune" in str(results))} for kind in KINDS}
            (results / "metrics.json").write_text(json.dumps({"kinds": kinds}))
        else:
            shutil.copytree(Path(arguments[-1], "moved"), Path(arguments[-1], "finetune"))

    monkeypatch.setattr(ablation, "_call", call)
    monkeypatch.setattr(ablation, "costs", lambda *_: {"image tokens": 9, "tower ms": 1.0, "language model ms": 2.0})
    own = ["--model", str(tmp_path / "model"), "--scenes", "1", "--output", str(tmp_path / "out")]
    own += ["--variants", "all tokens", "cubemap"]
    monkeypatch.setenv(cutouts.VARIABLE, "")
    ablation.main(own)
    assert called == ["panorama_vlm.evaluation", "panorama_vlm.train", "panorama_vlm.evaluation"] * 2
    rows = json.loads((tmp_path / "out/ablation.json").read_text())
    assert rows["cubemap"]["as it is"] == [0.5] and rows["cubemap"]["seam"] == [0.6]
    moved = PanoramaConfig.from_pretrained(tmp_path / "out/cubemap-1200-0/moved")
    assert moved.view_strategy == "cubemap" and moved.token_selection == "owned"
    assert (tmp_path / "out/ablation.png").is_file()
    ablation.main(own)
    assert len(called) == 6
    with pytest.raises(SystemExit, match="holds a run with other options"):
        ablation.main([*own, "--workers", "1"])
    with pytest.raises(SystemExit):
        ablation.main([*own[:-2], "AdamW"])
