"""The task for lmms-eval, through its own loader."""

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


def test_its_evaluator_asks_a_model(tmp_path, monkeypatch, make):
    tasks = pytest.importorskip("lmms_eval.tasks", reason="lmms-eval is not installed")
    from lmms_eval import evaluator
    from lmms_eval.api.model import lmms
    from panorama_vlm.ask import answer, question

    class Ours(lmms):
        def __init__(self):
            super().__init__()
            self.model, self.processor = make()

        def generate_until(self, requests):
            answers = []
            for words, _, visual, document, task, split in (request.args for request in requests):
                (panorama,) = visual(self.task_dict[task][split][document])
                answers.append(answer(self.model.eval(), self.processor, question(panorama, words), max_new_tokens=4))
            return answers

        def loglikelihood(self, requests):
            raise NotImplementedError

        generate_until_multi_round = loglikelihood

    write_scenes(tmp_path / "scenes", World(seed=3, width=128), 3, processes=1)
    monkeypatch.chdir(tmp_path)
    found = evaluator.simple_evaluate(
        model=Ours(),
        tasks=["panorama_synthetic"],
        task_manager=tasks.TaskManager(include_path=str(TASKS)),
        limit=4,
        device="cpu",
        bootstrap_iters=0,
    )
    assert len(found["samples"]["panorama_synthetic"]) == 4
    assert 0 <= found["results"]["panorama_synthetic"]["accuracy,none"] <= 1
