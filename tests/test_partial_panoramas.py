"""What the model makes of views that show nothing the camera saw."""

import pytest
import torch
from panorama_vlm.tests.test_reading import crop_values, encoded, photo_sphere
from PIL import Image

MASK = torch.tensor([[True, True, True, False, False, False, False, True, True], [True] * 9])


@pytest.fixture
def partial(panoramas, make):
    """A model, its processor, a panorama whose camera saw what lies in front, and a whole one."""
    model, processor = make(overlap_loss_weight_finetune=0.0)
    band = Image.new("RGB", (512, 256), "grey")
    band.paste(panoramas[0].crop((128, 0, 384, 256)), (128, 0))
    return model, processor, band, panoramas[1]


@pytest.mark.parametrize("mode", ["pairwise", "batchwise"])
@pytest.mark.parametrize("by_rays", [True, False])
def test_the_overlap_loss_is_that_of_the_pairs_of_seen_views(make, mode, by_rays):
    """Against the same loss of one panorama whose unseen views hold noise: masked, they change nothing."""
    model, _ = make(vicreg_mode=mode, use_anyres_e2p_vicreg=by_rays)
    features = torch.randn(2, 9, 64, 16)
    noisy = features.clone()
    noisy[0, 3:7] = 100 * torch.randn(4, 64, 16)
    loss, terms = model.overlap(features, MASK)
    again, _ = model.overlap(noisy, MASK)
    torch.testing.assert_close(again, loss)
    assert not torch.isclose(model.overlap(noisy)[0], loss)
    torch.testing.assert_close(*(model.overlap(features, m)[0] for m in (None, MASK.new_ones(2, 9))))
    assert model.overlap.metrics(features, MASK) == pytest.approx(model.overlap.metrics(noisy, MASK))
    assert torch.isfinite(torch.stack(list(terms))).all()


def test_pairs_of_seen_views_are_counted_one_by_one(make):
    model, _ = make()
    features = torch.randn(2, 9, 64, 16)
    whole = sum(len(m.x) for m in model.overlap.match(features))
    kept = sum(len(m.x) for m in model.overlap.match(features, view_mask=MASK))
    assert whole == 2 * 8  # a ring of eight tiles has eight neighbours
    assert kept == 8 + 3  # of the tiles at 0, 45, 270 and 315 degrees: 0-45, 270-315, 315-0
    assert model.overlap.count_pairs(2, 9) == whole and model.overlap.count_pairs(2, 9, MASK) == kept
    strips, _ = make(use_anyres_e2p_vicreg=False)
    kept = sum(len(m.x) for m in strips.overlap.match(features, view_mask=MASK))
    assert strips.overlap.count_pairs(2, 9, MASK) == kept


def test_nothing_to_compare_is_an_error_that_says_so(make):
    model, _ = make()
    nothing = torch.tensor([[True, True] + [False] * 7])
    with pytest.raises(ValueError, match="leave such panoramas out of stage 'vision'"):
        model(torch.zeros(1, 9, 3, 64, 64), stage="vision", view_mask=nothing)
    with pytest.raises(ValueError, match=r"view_mask must be \[1, 9\].*got \[1, 8\]"):
        model(torch.zeros(1, 9, 3, 64, 64), stage="vision", view_mask=nothing[:, :8])


def test_the_language_model_gets_the_tokens_of_seen_views_alone(partial, ask):
    model, processor, band, whole = partial
    inputs = ask(processor, band)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    mask = MASK[:1]
    per_view = torch.tensor(model.config.image_tokens_per_view)
    assert per_view.sum() == model.config.num_image_tokens == processor.num_image_tokens
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    (kept,) = model.get_image_features(inputs["pixel_values"], mask).pooler_output
    of_view = torch.arange(9).repeat_interleave(per_view)  # tokens come view by view
    torch.testing.assert_close(kept, features[mask[0][of_view]])

    placeholders = processor._image_token_counts({"pixel_values": inputs["pixel_values"], "view_mask": mask})
    assert placeholders == [len(kept)]
    assert processor._image_token_counts({"pixel_values": inputs["pixel_values"]}) == [model.config.num_image_tokens]
    with pytest.raises(
        ValueError, match=rf"partial panoramas, or those with further views, need {len(kept)} <image> tokens"
    ):
        model(**inputs, view_mask=mask)
    inputs["pixel_values"][:, 3:7] = 50.0  # what masked views hold does not matter
    row, is_image = inputs["input_ids"][0], inputs["input_ids"][0] == processor.image_token_id
    drop = is_image.nonzero()[:, 0][len(kept) :]
    keep = torch.ones(len(row), dtype=torch.bool)
    keep[drop] = False
    cut = {"input_ids": row[keep][None], "attention_mask": inputs["attention_mask"][:, keep], "view_mask": mask}
    noisy = model(**cut, pixel_values=inputs["pixel_values"]).logits
    clean = model(**cut, pixel_values=ask(processor, band)["pixel_values"]).logits
    torch.testing.assert_close(noisy, clean)


def test_a_partial_file_is_answered_trained_and_batched_with_a_whole_one(partial, tmp_path, panoramas):
    model, processor, _, whole = partial
    xmp = photo_sphere(**crop_values((512, 256), (120, 128), 64, 196))
    file = tmp_path / "part.jpg"
    file.write_bytes(encoded(panoramas[0].crop((196, 64, 316, 192)), "JPEG", xmp=xmp))

    def chat(image, answer=None):
        question = {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "location"}],
        }
        return [question] + ([{"role": "assistant", "content": answer}] if answer else [])

    batch = [chat(str(file)), chat(whole)]
    inputs = processor.apply_chat_template(
        batch, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", padding=True
    )
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1)
    per_view = torch.tensor(model.config.image_tokens_per_view)
    assert counts.tolist() == [int(per_view[inputs["view_mask"][0]].sum()), int(per_view.sum())]
    assert counts[0] < counts[1]
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    for messages, answer in zip(batch, together, strict=True):
        alone = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        assert torch.equal(model.generate(**alone, max_new_tokens=4, do_sample=False)[0, -4:], answer)

    training = processor.apply_chat_template(
        [chat(str(file), "a bright room"), chat(whole, "a park")], return_labels=True
    )
    spoken = [processor.tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in training["labels"]]
    assert [words.strip() for words in spoken] == ["a bright room", "a park"]
    assert torch.isfinite(model.train()(**training).loss)

    prompt = model.eval().generate(
        pixel_values=inputs["pixel_values"],
        view_mask=inputs["view_mask"],
        tokenizer=processor.tokenizer,
        max_new_tokens=2,
    )
    assert ((prompt == processor.image_token_id).sum(1) == counts).all()
