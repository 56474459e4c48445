"""The model called as trainers, harnesses and attribution tools call it."""

import pytest
import torch
from panorama_vlm import PanoramaVLM
from transformers import Trainer, TrainingArguments

LABELLED = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def taught(processor, panorama, question="location", answer="west"):
    content = [{"type": "image", "image": panorama}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], return_labels=True
    )


def test_ids_in_the_first_place_are_ids(make, ask, panoramas, tokenizer):
    model, processor = make()
    ids = tokenizer("Where is the sun?", return_tensors="pt").input_ids
    wanted = model(input_ids=ids).logits
    torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=0)
    torch.testing.assert_close(model(ids, torch.ones_like(ids)).logits, wanted, rtol=0, atol=0)
    inputs = ask(processor, panoramas[0])
    pixels, given = inputs["pixel_values"], inputs["input_ids"]
    wanted = model(pixel_values=pixels, input_ids=given).logits
    torch.testing.assert_close(model(pixels, given).logits, wanted, rtol=0, atol=0)
    torch.testing.assert_close(model(given, pixels).logits, wanted, rtol=0, atol=0)
    assert model(pixels, stage="vision").loss > 0
    with pytest.raises(TypeError, match="input_ids twice"):
        model(given, given, torch.ones_like(given))
    with pytest.raises(TypeError, match=r"floats, got torch\.uint8"):
        model(pixels.to(torch.uint8), given)

    options = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(input_ids=ids, **options)
    config = model.generation_config
    assert (model.generate(ids, **options) == answer).all()
    assert (model.generate(ids, config, **options) == answer).all()
    assert (model.generate(ids, attention_mask=torch.ones_like(ids), **options) == answer).all()
    assert (model.generate(pixels, given, **options) == model.generate(**inputs, **options)).all()


def test_a_placeholder_is_no_target_where_labels_are_a_copy_of_the_ids(make, panoramas):
    model, processor = make()
    batch = taught(processor, panoramas[0])
    copied = batch["input_ids"].clone()
    wanted = copied.masked_fill(copied == processor.image_token_id, -100)
    for mode in (True, False):
        model.train(mode)
        loss = model(**{**batch, "labels": copied}).loss
        torch.testing.assert_close(loss, model(**{**batch, "labels": wanted}).loss, rtol=0, atol=0)
        shifted = torch.nn.functional.pad(copied, (0, 1), value=-100)[:, 1:]
        given = {name: value for name, value in batch.items() if name != "labels"}
        torch.testing.assert_close(loss, model(**given, shift_labels=shifted).loss)


@pytest.mark.parametrize("mode", [True, False])
def test_a_batch_that_teaches_nothing_has_a_loss_of_zero(make, panoramas, mode):
    model, processor = make()
    batch = taught(processor, panoramas[0])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model.set_stage("resampler")
    model.train(mode)
    loss = model(**batch).loss
    assert loss == 0
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)


def test_pixels_get_gradients_though_the_tower_is_frozen(make, ask, panoramas):
    model, processor = make()
    model.set_stage("resampler")
    inputs = ask(processor, panoramas[0])
    pixels = inputs["pixel_values"].requires_grad_()
    model(pixel_values=pixels, input_ids=inputs["input_ids"]).logits[0, -1].max().backward()
    assert (pixels.grad.flatten(2).abs().amax(-1) > 0).all()  # every view and channel
    assert all(parameter.grad is None for parameter in model.model.vision_tower.parameters())


def test_only_stage_vision_trains_the_projector_of_a_loaded_folder(make, tower, panoramas, tmp_path):
    model, processor = make({**tower, "vision_use_head": True})
    model.save_pretrained(tmp_path)
    for each in (model, PanoramaVLM.from_pretrained(tmp_path)):
        each.train()
        each(**taught(processor, panoramas[0])).loss.backward()
        waits = [name for name, p in each.named_parameters() if p.requires_grad and p.grad is None]
        assert not waits, waits
        assert any(name.startswith("vicreg_projector") for name in each.set_stage("vision"))


def test_trainer_evaluates_logits_and_keeps_nothing_else(make, panoramas, tmp_path):
    model, processor = make()
    rows = [taught(processor, panorama, answer=answer) for panorama, answer in zip(panoramas, "abcd", strict=False)]
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"right": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True, label_names=["labels"]),
        data_collator=lambda rows: {name: torch.cat([row[name] for row in rows]) for name in rows[0]},
        eval_dataset=rows,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    figures = trainer.evaluate()
    length = rows[0]["input_ids"].shape[1]
    assert seen["shape"] == (4, length) and 0 <= figures["eval_right"] <= 1
    with torch.no_grad():
        wanted = torch.stack([model.eval()(**row).loss for row in rows]).mean()
    assert figures["eval_loss"] == pytest.approx(float(wanted), rel=1e-4)
    model.train()
    assert model(**rows[0]).logits is None and model(**rows[0], return_logits=True).logits.shape[:2] == (1, length)
