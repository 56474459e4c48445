"""`generate` with every mode, as those who know it from other models use it."""

import copy
import io
import logging
from contextlib import redirect_stdout

import pytest
import torch
from panorama_vlm import PanoramaVLM
from transformers import AutoModelForCausalLM, DynamicCache, TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
CHAT = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}


@pytest.fixture(params=["outside", "inside"])
def model_and_processor(make, request):
    """`<image>` outside the language model's vocabulary, and inside. Weights that say different things."""
    model, processor = make()
    if request.param == "inside":
        model.resize_token_embeddings(processor.image_token_id + 1)
    torch.manual_seed(1)
    for parameter in model.model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for parameter in model.model.projection.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model.eval(), processor


def question(words, panorama=None):
    image = [] if panorama is None else [{"type": "image", "image": panorama}]
    return {"role": "user", "content": [*image, {"type": "text", "text": words}]}


@pytest.fixture
def batch(model_and_processor, panoramas):
    """Prompts of different lengths; one has two panoramas, one has none."""
    _, processor = model_and_processor
    both = question("Compare.", panoramas[0])
    both["content"].append({"type": "image", "image": panoramas[1]})
    return [[question("Where is the sun?", panoramas[2])], [both], [question("Hello")]]


def encoded(processor, messages):
    return processor.apply_chat_template(messages, **CHAT)


def greedy(model, inputs, steps=8):
    """The plain loop: no cache, nothing kept."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, **given).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 5},
    "samples": {"do_sample": True, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "penalised": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_with_and_without_cache_and_in_pieces_the_answers_are_the_same(model_and_processor, batch, mode):
    model, processor = model_and_processor
    inputs = encoded(processor, batch)
    answers = []
    for way in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 37}):
        if way.get("prefill_chunk_size") and "beams" in mode:
            continue
        set_seed(0)
        answers.append(model.generate(**inputs, **{**OPTIONS, **MODES[mode], **way, "disable_compile": True}))
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])
    if mode == "greedy":
        assert torch.equal(answers[0], greedy(model, inputs))


@pytest.mark.parametrize("mode", ["greedy", "beams", "penalised"])
def test_each_answer_of_a_batch_is_the_one_given_alone(model_and_processor, batch, mode):
    model, processor = model_and_processor
    together = model.generate(**encoded(processor, batch), **{**OPTIONS, **MODES[mode]})
    for row, messages in zip(together, batch, strict=True):
        alone = model.generate(**encoded(processor, [messages]), **{**OPTIONS, **MODES[mode]})
        assert torch.equal(row[-8:], alone[0, -8:])


@pytest.mark.slow
def test_compiled_answers_are_the_same(model_and_processor, batch):
    model, processor = model_and_processor
    inputs = encoded(processor, batch)
    plain = model.generate(**inputs, **OPTIONS)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=False)
    assert torch.equal(model.generate(**inputs, **OPTIONS, cache_implementation="static"), plain)


def test_a_batch_without_its_mask_is_masked_by_the_padding_token(model_and_processor, batch, caplog):
    model, processor = model_and_processor
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    inputs = encoded(processor, batch)
    options = {**OPTIONS, "pad_token_id": processor.tokenizer.pad_token_id}
    wanted = model.generate(**inputs, **options)
    given = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(model.generate(**given, **options), wanted)
    rolled = torch.stack(
        [row.roll(int(mask.sum())) for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    )

    logger = logging.getLogger("transformers")
    caplog.set_level(logging.WARNING, logger="transformers")  # other tests may have asked for silence
    logger.addHandler(caplog.handler)
    model.generate(**{**given, "input_ids": rolled}, **options)
    assert "right-padding was detected" in caplog.text
    transformers_logging.warning_once.cache_clear()
    model.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    model(**given)
    logger.removeHandler(caplog.handler)
    assert "passing in an `attention_mask`" in caplog.text


def test_processors_see_the_words_of_a_prompt_and_nothing_of_its_panoramas(model_and_processor, panoramas):
    """Against the formulas: a penalty divides or multiplies the logits of words that were said, an n-gram is not said
    twice; 80 placeholders are no words."""
    model, processor = model_and_processor
    inputs = encoded(processor, [question("Where is the sun?", panoramas[0])])
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, : processor.image_token_id]
    said = torch.tensor([token for token in inputs["input_ids"][0].tolist() if token != processor.image_token_id])
    options = {**OPTIONS, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    wanted = logits.clone()
    wanted[said] = torch.where(logits[said] < 0, logits[said] * 1.5, logits[said] / 1.5)
    scores = model.generate(**inputs, **options, repetition_penalty=1.5).scores[0][0]
    torch.testing.assert_close(scores[: len(wanted)], wanted)
    wanted = logits.clone()
    wanted[said] = -torch.inf
    scores = model.generate(**inputs, **options, no_repeat_ngram_size=1).scores[0][0]
    torch.testing.assert_close(scores[: len(wanted)], wanted)
    assert 0 not in said  # the token that stood for a placeholder


def test_a_streamer_prints_the_prompt_as_it_is(model_and_processor, panoramas):
    model, processor = model_and_processor
    inputs = encoded(processor, [question("Where?", panoramas[0])])
    with redirect_stdout(io.StringIO()) as printed:
        answer = model.generate(**inputs, **OPTIONS, streamer=TextStreamer(processor.tokenizer))
    assert printed.getvalue().strip() == processor.decode(answer[0]).strip()
    assert "<|end|>" not in printed.getvalue().split("Assistant:")[0]


def test_guessed_tokens_change_nothing(model_and_processor, make, panoramas):
    model, processor = model_and_processor
    words = "the sun is west, the sun is west, the sun"
    inputs = encoded(processor, [question(words, panoramas[0])])
    wanted = model.generate(**inputs, **OPTIONS)
    if model.config.image_token_id < model.config.text_config.vocab_size:
        assert torch.equal(model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3), wanted)
    else:
        with pytest.raises(ValueError, match="makes room for it"):
            model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3)
    twin = copy.deepcopy(model)
    assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=twin), wanted)
    torch.manual_seed(3)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=twin), wanted)
    language = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    language.generation_config.eos_token_id = None
    if model.config.image_token_id < model.config.text_config.vocab_size:
        assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=language), wanted)
    else:
        with pytest.raises(ValueError, match="holds <image>, which is number"):
            model.generate(**inputs, **OPTIONS, assistant_model=language)


def test_guidance_is_the_formula(model_and_processor, panoramas):
    """Sanchez et al. 2023: u + g (c - u) in log-probabilities, u from the last token alone."""
    model, processor = model_and_processor
    inputs = encoded(processor, [question("Where?", panoramas[0])])
    options = {**OPTIONS, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    scores = model.generate(**inputs, **options, guidance_scale=1.7).scores[0][0]
    words = processor.image_token_id
    with torch.no_grad():
        shown = model(**inputs).logits[0, -1].log_softmax(-1)
        alone = model(input_ids=inputs["input_ids"][:, -1:]).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(scores[:words], (alone + 1.7 * (shown - alone))[:words], rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_without_looking_again(model_and_processor, panoramas):
    model, processor = model_and_processor
    looked = []
    model.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    messages = [question("Where is the sun?", panoramas[0])]
    inputs = encoded(processor, [messages])
    cache = DynamicCache()
    first = model.generate(**inputs, **OPTIONS, past_key_values=cache)
    assert len(looked) == 1

    def continued(ids, **others):
        """The whole conversation, whose beginning is the one that the cache holds."""
        more = processor.tokenizer(" And the moon?", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([ids, *others.get("images", []), more], 1)

    ids = continued(first)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    wanted = model.generate(**whole, **OPTIONS)
    del looked[:]
    kept = copy.deepcopy(cache)
    second = model.generate(**whole, **OPTIONS, past_key_values=cache)
    assert torch.equal(second, wanted) and not looked
    del whole["pixel_values"]  # it need not be handed over again
    assert torch.equal(model.generate(**whole, **OPTIONS, past_key_values=kept), wanted) and not looked

    more = encoded(processor, [question("", panoramas[1])])
    image = more["input_ids"][more["input_ids"] == processor.image_token_id][None]
    ids = continued(second, images=[image])
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([inputs["pixel_values"], more["pixel_values"]]),
    }
    wanted = model.generate(**whole, **OPTIONS)
    del looked[:]
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="<image> tokens that past_key_values do not"):
        model.generate(input_ids=ids, attention_mask=mask, **OPTIONS, past_key_values=cache)
    with pytest.raises(ValueError, match="hand over the whole conversation"):
        model.generate(input_ids=ids[:, :30], attention_mask=mask[:, :30], **OPTIONS, past_key_values=cache)
    assert torch.equal(model.generate(**whole, **OPTIONS, past_key_values=cache), wanted)
    assert len(looked) == 1  # at the new one alone
    cut = DynamicCache(config=model.config.text_config)
    model(
        input_ids=ids[:, :20],
        past_key_values=cut,
        use_cache=True,
        mm_encoder_outputs={
            "image": type(model.get_image_features(more["pixel_values"]))(
                pooler_output=[
                    model.get_image_features(inputs["pixel_values"]).pooler_output[
                        0, : int((ids[:, :20] == processor.image_token_id).sum())
                    ]
                ]
            )
        },
    )
    with pytest.raises(ValueError, match="in the middle of a panorama"):
        model.generate(**whole, **OPTIONS, past_key_values=cut)


def test_the_head_that_peft_grows_never_says_image(make, ask, panoramas, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = make()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        PanoramaVLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    processor.tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    inputs = ask(processor, panoramas[0])
    options = {**OPTIONS, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    logits = loaded.generate(**inputs, **options).logits[0][0]
    assert len(logits) > processor.image_token_id  # it was grown
    assert logits.softmax(-1)[processor.image_token_id] == 0
    wanted = model.generate(**inputs, **options).logits[0][0]
    torch.testing.assert_close(logits[: len(wanted)], wanted)
