import pytest
import yaml
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
