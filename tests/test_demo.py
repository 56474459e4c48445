import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from panorama_vlm.demo.views import colour, draw_matches, draw_views, main, outline
from panorama_vlm.geometry_panorama import View, ViewOptions

ASK = Path(__file__).resolve().parent.parent / "demo" / "ask.py"


def test_the_picture_shows_each_tile_in_its_colour_on_the_panorama_and_below_it(panoramas):
    plan = ViewOptions("anyres_e2p", 90.0, 0.5).plan
    picture = np.array(draw_views(panoramas[0], plan, width=512, view_size=96))
    for index in plan.tiles:
        is_colour = (picture == colour(index, plan.num_views)).all(-1)
        assert is_colour[256:].sum() > 4 * 90  # the frame of the view
        assert is_colour[:256].sum() > 20  # its outline; neighbours cover part of it


def test_an_outline_is_where_the_tile_ends_and_is_cut_at_the_seam():
    front = np.concatenate(outline(View("perspective", 0, 0, 90), 3600, 1800))
    assert front[:, 0].min() == pytest.approx(3600 * 3 / 8, abs=10)
    assert front[:, 0].max() == pytest.approx(3600 * 5 / 8, abs=10)
    assert len(outline(View("perspective", 0, 0, 90), 3600, 1800)) == 1
    behind = outline(View("perspective", 180, 0, 90), 3600, 1800)
    assert len(behind) > 1
    for piece in behind:
        assert np.abs(np.diff(np.array(piece)[:, 0])).max(initial=0) < 1800


def test_the_command_draws_both_pictures(panoramas, tmp_path, capsys):
    panoramas[0].save(tmp_path / "panorama.png")
    paths = [str(tmp_path / name) for name in ("panorama.png", "views.png", "matches.png")]
    main([paths[0], "--output", paths[1], "--matches", paths[2]])
    assert capsys.readouterr().out.count(str(tmp_path)) == 2
    assert all(Path(path).stat().st_size > 10_000 for path in paths)


def test_matches_are_drawn_for_other_plans_too(panoramas):
    assert draw_matches(panoramas[0], ViewOptions("anyres_e2p", 110.0, 0.3).plan, 0.3, tokens=8, size=128).width == 264


@pytest.mark.slow
def test_the_process_that_asks_needs_only_the_folder(make, tmp_path, samples):
    import json
    import shutil

    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    two = tmp_path / "samples"
    two.mkdir()
    (two / "metadata.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples[3:5]))
    for name in {sample["file_name"] for sample in samples[3:5]}:
        shutil.copy(ASK.parent.parent / "samples" / name, two)
    command = [sys.executable, str(ASK), str(tmp_path / "model"), str(two), str(tmp_path / "answers.json")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [set(answer) for answer in answers] == [{"panorama", "question", "expected", "answer"}] * 2
    assert [answer["expected"] for answer in answers] == [sample["annotation"] for sample in samples[3:5]]


@pytest.mark.slow
def test_a_model_is_asked_about_unseen_scenes_and_its_answers_are_counted(make, tmp_path, capsys):
    import json

    from panorama_vlm.demo.default_model import main as ask_unseen

    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    ask_unseen(
        [*("--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")), "--scenes", "2", "--questions", "4"]
    )
    said = capsys.readouterr().out
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "scenes" / "metadata.jsonl").read_text().splitlines()]
    assert [a["question"].split("\n")[0] for a in answers] == [q for row in rows for q in row["questions"]]
    assert [a["kind"] for a in answers] == [kind for row in rows for kind in row["kinds"]]
    judged = [a["right"] for a in answers if a["right"] is not None]
    assert f"{sum(judged)} of {len(judged)}" in said
    assert (tmp_path / "out" / "views.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        ask_unseen(["--model", str(tmp_path), "--output", str(tmp_path / "other")])
    assert "no model" in capsys.readouterr().err
