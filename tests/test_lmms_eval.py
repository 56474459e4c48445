"""The task for lmms-eval, through its own loader. The package asks for torchvision, so it is installed without what it
depends on, where one wants to run this."""

from pathlib import Path

import pytest
from panorama_vlm.synthetic.write import World, write_scenes

pytestmark = pytest.mark.tools
TASKS = Path(__file__).resolve().parent.parent / "evaluation" / "lmms_eval"


def test_lmms_eval_loads_the_task_asks_and_judges(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lmms_eval.tasks", reason="lmms-eval is not installed")
    write_scenes(tmp_path / "scenes", World(seed=3, width=128), 6, processes=1)
    monkeypatch.chdir(tmp_path)
    manager = tasks.TaskManager(include_path=str(TASKS))
    task = tasks.get_task_dict(["panorama_synthetic"], manager)["panorama_synthetic"]
    docs = list(task.test_docs())
    assert len(docs) > 20 and len({doc["kind"] for doc in docs}) > 8
    assert all(task.doc_to_visual(doc)[0].size == (128, 64) for doc in docs)
    choice = next(doc for doc in docs if doc["kind"] == "nearest_of_four")
    assert "\nA. " in task.doc_to_text(choice) and task.doc_to_target(choice) in "ABCD"
    aggregate = task.aggregation()
    for answer, expected in ((task.doc_to_target, 1.0), (lambda _: "nothing of the kind", 0.0)):
        results = [task.process_results(doc, [answer(doc)]) for doc in docs]
        for metric in ("accuracy", "mean_of_kinds"):
            assert aggregate[metric]([result[metric] for result in results]) == pytest.approx(expected, abs=0.1)
