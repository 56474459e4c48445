import pytest
from panorama_vlm.benchmarks import headings
from panorama_vlm.synthetic.write import World, write_scenes


@pytest.fixture
def scenes(tmp_path):
    kinds = ("count", "caption_around", "grounding_all")
    return write_scenes(tmp_path / "fresh", World(5, 64, 3, kinds, steps=True), 12, processes=1)


@pytest.mark.parametrize("kind", headings.KINDS)
def test_what_the_world_says_itself_is_right_and_nothing_else(scenes, kind):
    asked = headings.questions(scenes, kind)
    assert asked and all("<think>" not in each["answer"] for each in asked)
    for each in asked:
        assert headings.is_right(each["answer"], each)
        assert not headings.is_right("", each) and not headings.is_right("seven: [0, 80, 5, 5]", each)


def test_votes_are_those_of_the_headings_that_are_counted(scenes, capsys):
    asked = headings.questions(scenes, "count")
    right = iter(each["answer"] for each in asked)

    def pipe(file, words, headings=1, turn_words=None, **_):
        if headings == 1:
            return {"answer": "wrong"}
        answer = next(right)
        votes = ["wrong", answer, "wrong", answer, answer, answer, "", answer]
        return {"votes": votes, "agreement": 5 / 8}

    found, agreeing, voted, once = headings.ask(pipe, asked, False)
    assert found == [[False, False, True, True]] * len(asked)  # of 0, 90, 180 and 270 degrees two are wrong alike
    assert agreeing == [5] * len(asked) and voted >= 0 and once >= 0
    line = headings.line("count", [each["file"] for each in asked], found, 0.5, 0.1)
    assert line == f"| `count` | 0.0 (0 to 0) | 0.0 | 100.0 (100 to 100) | 100.0 | {len(asked)} | 100 | 500 |"
    line = headings.agreement_line("count", [True, False, True, True], [5, 8, 7, 6])
    assert line == "| `count` | 50 % of 2 | 100 % of 2 | none |"


def test_a_folder_without_such_questions_is_named(tmp_path, capsys):
    folder = write_scenes(tmp_path / "fresh", World(5, 64, 1, ("existence",)), 2, processes=1)
    with pytest.raises(SystemExit):
        headings.main([str(folder), "--kinds", "count"])
    assert "there is no question of kind count" in capsys.readouterr().err
