import pytest
import yaml
from panorama_vlm.benchmarks.ablation import BATCH, GROUPS, VARIANTS, configuration
from panorama_vlm.synthetic.questions import KINDS
from panorama_vlm.train.build import compose
from panorama_vlm.train.config import load_config


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_composes_with_the_same_budget(name, tmp_path):
    written, stages = configuration(name, 3, panoramas=1200, workers=1)
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(written))
    config = load_config([str(tmp_path / "ablation.yaml")])
    model, processor = compose(config.compose, config.options)
    assert processor.num_image_tokens == model.config.num_image_tokens
    assert (config.finetune.max_steps, config.finetune.batch_size, config.seed) == (800 // BATCH, BATCH, 3)
    assert stages[-1] == "finetune"


def test_each_kind_is_in_one_group():
    assert sorted(kind for group in GROUPS.values() for kind in group) == sorted(KINDS)
