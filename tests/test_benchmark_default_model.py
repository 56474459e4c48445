"""What an evaluation found, split: counted by hand on a scene written for it."""

import json

import pytest
from panorama_vlm.benchmarks.default_model import main, splits


@pytest.fixture
def folders(tmp_path):
    """Two scenes, and answers to their questions."""
    data, results = tmp_path / "fresh", tmp_path / "results"
    data.mkdir()
    results.mkdir()
    rows = [
        {
            "kinds": ["grounding", "count", "what_is_at_place", "caption_around"],
            "questions": ["Where is the red cube?", "How many balls?", "What is at [179, 0, 20, 20]?", "Name them."],
            "places": [[[0, 0, 20, 20]], None, None, None],
            "conversations": [{}] * 7 + [{"value": "front: a; right: b; back: c; left: d."}],
        },
        {
            "kinds": ["grounding", "caption_around"],
            "questions": ["Where is the dog?", "Name them."],
            "places": [[[90, 60, 12, 9]], None],
            "conversations": [{}] * 3 + [{"value": "front: a; right: b; right: c; back: d; left: e."}],
        },
    ]
    scenes = [{"panorama": None}, {"panorama": "lab.jpg"}]
    answers = [
        {"id": "row-1.1", "kind": "grounding", "right": True, "answer": "[0, 0, 20, 16]"},
        {"id": "row-1.2", "kind": "count", "right": False, "answer": "two"},
        {"id": "row-1.3", "kind": "what_is_at_place", "right": True, "answer": "dog"},
        {"id": "row-1.4", "kind": "caption_around", "right": True, "answer": ""},
        {"id": "row-2.1", "kind": "grounding", "right": True, "answer": "[90, 60, 8, 9]"},
        {"id": "row-2.2", "kind": "caption_around", "right": False, "answer": ""},
    ]
    files = ((data / "metadata.jsonl", rows), (data / "scenes.jsonl", scenes), (results / "predictions.jsonl", answers))
    for path, lines in files:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data, results


def test_answers_are_counted_where_they_belong(folders, capsys):
    assert splits(*folders) == {
        "all else before drawn": [True, True],
        "all else before lab.jpg": [True],
        "caption_around before drawn": [True],
        "caption_around before lab.jpg": [False],
        "caption_around, more than 4 things": [False],
        "caption_around, up to 4 things": [True],
        "grounding, IoU at least 0.75": [True, False],
        "grounding, beyond 50 degrees": [True],
        "grounding, from 10 degrees": [True],
        "grounding, named things": [True],
        "grounding, solids": [True],
        "grounding, under 10 degrees": [True],
        "grounding, up to 50 degrees": [True],
        "lists before drawn": [False, True],
        "lists before lab.jpg": [False],
        "place across the seam": [True],
        "place elsewhere": [True, True],
    }
    main([str(each) for each in folders])
    assert "place elsewhere                      100.0 % of 2" in capsys.readouterr().out


def test_answers_to_other_questions_are_refused(folders):
    data, results = folders
    path = results / "predictions.jsonl"
    path.write_text(path.read_text().replace("row-1.2", "row-9.2"))
    with pytest.raises(ValueError, match="1 answers are to no question"):
        splits(data, results)
