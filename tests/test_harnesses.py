"""Evaluation harnesses ask a saved folder by their own classes, and get what the model says when asked by itself."""

import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.tests.launching import SAMPLES
from PIL import Image

pytestmark = pytest.mark.tools
QUESTIONS = ["Where is the sun?", "What is this?", "Count the doors."]


@pytest.fixture
def folder(make, tmp_path):
    model, processor = make()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def panorama(index):
    return Image.open(sorted(SAMPLES.glob("*.jpg"))[index])


def asked_by_itself(folder, conversations, dtype, **options):
    """The answers to conversations, one at a time."""
    model = PanoramaVLM.from_pretrained(folder, dtype=dtype).eval()
    processor = PanoramaProcessor.from_pretrained(folder)
    answers = []
    for messages in conversations:
        options_of_text = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(messages, **options_of_text).to(dtype)
        new = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True))
    return answers


def test_lmms_eval_asks_as_the_model_is_asked_by_itself(folder):
    """`--model huggingface`: panoramas of a batch in one list, `videos=[]` and `audios=[]` beside them, text alone."""
    harness = pytest.importorskip("lmms_eval.models.chat.huggingface", reason="lmms-eval is not installed")
    from lmms_eval.api.instance import Instance

    def messages(index, key="url"):
        images = [] if index == 1 else [{"type": "image", key: panorama(index)}]
        return [{"role": "user", "content": [*images, {"type": "text", "text": QUESTIONS[index]}]}]

    conversations = [messages(index, "image") for index in range(3)]
    expected = asked_by_itself(folder, conversations, torch.bfloat16, max_new_tokens=6)
    about = {"task": "panoramas", "doc_id": 0, "repeats": 1}
    for batch_size in (1, 3):
        model = harness.Huggingface(folder, "cpu", "cpu", batch_size, trust_remote_code=True)
        model.task_dict = {"panoramas": {"test": range(3)}}
        asked = [
            Instance("generate_until", ("", messages, {"max_new_tokens": 6}, index, "panoramas", "test"), index, about)
            for index in range(3)
        ]
        assert [result.text for result in model.generate_until(asked)] == expected


def test_lm_eval_scores_texts_as_float64_does(folder):
    """`--model hf`: log-likelihoods of continuations and of whole texts, the ids given by position; and answers."""
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    scorer = harness.HFLM(folder, device="cpu", dtype="float32", batch_size=2, trust_remote_code=True)
    model = PanoramaVLM.from_pretrained(folder).double().eval()
    tokenizer = PanoramaProcessor.from_pretrained(folder).tokenizer

    def score(context, continuation):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            log = model(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : -1]
        target = ids[0, start:]
        return log.gather(1, target[:, None]).sum().item(), bool((log.argmax(-1) == target).all())

    pairs = [(question, f" {word}") for question in QUESTIONS for word in ("north", "sky")]
    for (found, greedy), pair in zip(
        scorer.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]),
        pairs,
        strict=True,
    ):
        assert (found, greedy) == (pytest.approx(score(*pair)[0], rel=1e-4), score(*pair)[1])
    (rolling,) = scorer.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (QUESTIONS[0],), 0)])
    assert rolling == pytest.approx(score(tokenizer.eos_token, QUESTIONS[0])[0], rel=1e-4)
    until = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    answers = scorer.generate_until(
        [Instance("generate_until", {}, (text, until), i) for i, text in enumerate(QUESTIONS)]
    )
    for text, answer in zip(QUESTIONS, answers, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        new = model.generate(input_ids=inputs["input_ids"], max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.split("\n\n")[0]


def test_lm_eval_asks_about_panoramas_as_the_model_is_asked_by_itself(folder):
    """`--model hf-multimodal`, with the chat template and several panoramas."""
    harness = pytest.importorskip("lm_eval.models.hf_vlms", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    asker = harness.HFMultimodalLM(folder, device="cpu", dtype="float32", batch_size=2, trust_remote_code=True)
    shown = [[panorama(0)], [panorama(1), panorama(2)], [panorama(3)]]
    conversations = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
            }
        ]
        for images, text in zip(shown, QUESTIONS, strict=True)
    ]
    until = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    asked = []
    for index, (images, text) in enumerate(zip(shown, QUESTIONS, strict=True)):
        prompt = asker.apply_chat_template([{"role": "user", "content": "<image>" * len(images) + text}])
        asked.append(Instance("generate_until", {}, (prompt, until, {"visual": images}), index))
    expected = asked_by_itself(folder, conversations, torch.float32, max_new_tokens=6)
    assert asker.generate_until(asked) == [answer.split("\n\n")[0] for answer in expected]
