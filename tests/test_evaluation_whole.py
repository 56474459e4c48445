"""The evaluation from a file as it was released to the report, and trained by what the trainer leaves."""

import json
import shutil

import pytest
from accelerate import Accelerator
from panorama_vlm.evaluation.__main__ import main
from panorama_vlm.evaluation.evaluate import EvaluationOptions, evaluate
from panorama_vlm.synthetic.write import World, write_scenes
from panorama_vlm.tests.launching import SAMPLES, run_here
from panorama_vlm.tests.test_evaluation_formats import GOOD, jsonl, table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run of three stages on rendered scenes leaves."""
    output = tmp_path_factory.mktemp("run")
    stages = [option for stage in ("vision", "resampler", "finetune") for option in (f"--{stage}.max_steps", 2)]
    run_here(output, *stages, "--data", "synthetic://?scenes=12&seed=1&width=128", "--num_workers", 0)
    return str(output / "finetune")


@pytest.mark.parametrize("format", GOOD)
def test_one_file_of_each_format_is_evaluated(trained, tmp_path, format):
    shutil.copy(SAMPLES / "park.jpg", tmp_path)
    broken = {key: value for key, value in GOOD[format].items() if key in ("image", "file_name", "url", "item_id")}
    if format == "quic360":
        data = table(tmp_path / "data.tsv", [GOOD[format], {**GOOD[format], "annotation": ""}])
    else:
        data = jsonl(tmp_path / "data.jsonl", [GOOD[format], broken])
    output = tmp_path / "out"
    metrics = evaluate(EvaluationOptions(trained, data, output=str(output), max_new_tokens=4), Accelerator())
    assert metrics["count"] == 1 and metrics["dropped"] == 1
    (said,) = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert isinstance(said["answer"], str)
    assert "<html" in (output / "report.html").read_text()[:200].lower()


def test_samples_and_rendered_scenes_are_evaluated_with_every_baseline(trained, tmp_path, capsys):
    write_scenes(tmp_path / "scenes", World(seed=5, width=128, questions=6), 4, processes=1)
    rows = [json.loads(line) for line in (tmp_path / "scenes/metadata.jsonl").read_text().splitlines()]
    for name, data, more in (
        ("of samples", SAMPLES, ["--limit", "8"]),
        ("of scenes", tmp_path / "scenes", ["--turn", "2", "--tilt", "5", "--blind", "--always-most-common"]),
    ):
        main([trained, str(data), "--output", str(tmp_path / name), "--max-new-tokens", "4", *more])
        assert "headline" in capsys.readouterr().out
    found = json.loads((tmp_path / "of scenes/metrics.json").read_text())
    assert found["count"] == sum(len(row["kinds"]) for row in rows)
    kinds = [kind for row in rows for kind in row["kinds"]]
    assert {kind: each["count"] for kind, each in found["kinds"].items()} == {kind: kinds.count(kind) for kind in kinds}
    assert found["turn"]["left_out"]["does not turn"] == sum(turns == "no" for row in rows for turns in row["turns"])
