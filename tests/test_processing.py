import base64
import builtins
import io

import pytest
import torch
from panorama_vlm import PanoramaProcessor
from panorama_vlm.places_panorama import BFoV, NamedPlace, read_places


def chat(question, answer=None, panorama="no panorama"):
    content = [{"type": "text", "text": question}]
    if panorama != "no panorama":
        content.insert(0, {"type": "image", "image": panorama})
    messages = [{"role": "user", "content": content}]
    return messages + ([] if answer is None else [{"role": "assistant", "content": answer}])


def supervised(processor, batch, row):
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


def test_a_placeholder_becomes_exactly_num_image_tokens(make, panoramas):
    model, processor = make()
    inputs = processor(images=panoramas[0], text="<image>What is here?", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == model.config.num_image_tokens == 80
    assert inputs["pixel_values"].shape == (1, 9, 3, 64, 64)


def test_several_panoramas_in_a_conversation_and_in_a_batch(make, panoramas):
    _, processor = make()
    inputs = processor(
        images=[[panoramas[0], panoramas[1]], [panoramas[2]]],
        text=["<image> and <image>: what differs?", "And in <image>?"],
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape[0] == 3
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [160, 80]


def test_padding_is_on_the_left_for_generation_and_on_the_right_for_training(make, panoramas):
    _, processor = make()
    inputs = processor(images=panoramas[:2], text=["<image>a", "<image>a longer question"], return_tensors="pt")
    assert inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist())
    assert inputs["attention_mask"][0, 0] == 0
    batch = processor.apply_chat_template(
        [chat("a", "b", panoramas[0]), chat("a longer question", "and a long answer", panoramas[1])], return_labels=True
    )
    assert batch["attention_mask"][0, 0] == 1 and batch["attention_mask"][0, -1] == 0
    assert batch["input_ids"][0, -1] == processor.tokenizer.pad_token_id
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_labels_supervise_only_the_assistants_words_and_the_end_of_its_turn(make, panoramas):
    _, processor = make()
    messages = chat("Where is the sun?", "Low in front.", panoramas[0]) + chat("Sure? Low in front.", "Yes.")
    batch = processor.apply_chat_template([messages, chat("floor", "Grey.", panoramas[1])], return_labels=True)
    assert supervised(processor, batch, 0) == " Low in front.<|end|> Yes.<|end|>"
    assert supervised(processor, batch, 1) == " Grey.<|end|>"
    kept = batch["labels"] != -100
    torch.testing.assert_close(batch["labels"][kept], batch["input_ids"][kept])


def test_what_is_supervised_follows_what_generation_is_given(make, panoramas):
    _, processor = make()
    prompt = processor.apply_chat_template(
        chat("sky", None, panoramas[0]),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    batch = processor.apply_chat_template([chat("sky", "Blue.", panoramas[0])], return_labels=True)
    length = prompt["input_ids"].shape[1]
    torch.testing.assert_close(batch["input_ids"][:, :length], prompt["input_ids"])
    assert (batch["labels"][0, :length] == -100).all() and batch["labels"][0, length] != -100


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_text_only_chat_template_learns_to_read_panoramas(make, tokenizer, panoramas):
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    _, processor = make(system_prompt='Look "around".')
    assert processor.apply_chat_template(chat("sky?", None, panoramas[0]), add_generation_prompt=True) == (
        '<|im_start|>system\nLook "around".<|im_end|>\n<|im_start|>user\n<image>sky?<|im_end|>\n<|im_start|>assistant\n'
    )
    batch = processor.apply_chat_template([chat("sky?", "Blue.", panoramas[0])], return_labels=True)
    assert supervised(processor, batch, 0) == "Blue.<|im_end|>"


def test_a_system_message_of_the_conversation_takes_the_place_of_the_system_prompt(make):
    _, processor = make(system_prompt="default")
    messages = [{"role": "system", "content": "mine"}, *chat("hello")]
    assert processor.apply_chat_template(messages) == "System: mine\nUser: hello\n"


def test_an_unknown_part_of_a_message_is_refused(make):
    _, processor = make()
    with pytest.raises(Exception, match="got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_an_empty_question_asks_the_default_prompt_with_a_warning(make, panoramas):
    _, processor = make(default_generation_prompt="Describe the sky.")
    with pytest.warns(UserWarning, match="Describe the sky"):
        inputs = processor(images=panoramas[0], text="<image>", return_tensors="pt")
    assert processor.decode(inputs["input_ids"][0]).endswith("<image>Describe the sky.")
    with pytest.warns(UserWarning, match="Describe the sky"):
        text = processor.apply_chat_template(chat("  ", None, panoramas[0]))
    assert "Describe the sky." in text


@pytest.mark.parametrize(("position", "expected"), [("start", 0), ("end", -1)])
def test_a_text_without_placeholder_gets_one_with_a_warning(make, panoramas, position, expected):
    _, processor = make(vision_token_fallback_position=position)
    with pytest.warns(UserWarning, match=f"no <image> in the text: inserted at the {position}"):
        inputs = processor(images=panoramas[0], text="What is here?", return_tensors="pt")
    assert inputs["input_ids"][0, expected] == processor.image_token_id


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<image><image> what?", 1, "the texts have 2 <image>, but there are 1 panoramas"),
        ("<image> what?", 2, "the texts have 1 <image>, but there are 2 panoramas"),
        (["<image><image>", "none"], 0, "the texts have 2 <image>, but there are 0 panoramas"),
    ],
)
def test_more_or_fewer_placeholders_than_panoramas_is_an_error_that_names_both(make, panoramas, text, count, message):
    _, processor = make()
    with pytest.raises(ValueError, match=message):
        processor(images=panoramas[:count] or None, text=text, return_tensors="pt")


def test_counts_are_checked_text_by_text_where_they_are_known(make, panoramas):
    _, processor = make()
    with pytest.raises(ValueError, match=r"\[2, 1\] <image>, but there are \[1, 2\] panoramas"):
        processor(
            images=[[panoramas[0]], [panoramas[1], panoramas[2]]],
            text=["<image><image> a", "<image> b"],
            return_tensors="pt",
        )


def test_a_text_that_is_too_long_is_refused_and_never_cut(make, panoramas):
    _, processor = make(max_text_length=40)
    with pytest.raises(ValueError, match="too long: .* text tokens, at most max_text_length=40"):
        processor.apply_chat_template([chat("a", "word " * 100, panoramas[0])], return_labels=True)
    batch = processor.apply_chat_template([chat("a", "b", panoramas[0])], return_labels=True)
    assert 80 < batch["input_ids"].shape[1] <= 80 + 40


def test_text_alone_and_images_alone(make, panoramas):
    _, processor = make()
    assert set(processor(text="hello", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert set(processor(images=panoramas[0], return_tensors="pt")) == {"pixel_values"}


def test_save_and_load_keeps_everything(make, tmp_path, panoramas):
    _, processor = make(default_generation_prompt="Say.", vision_token_fallback_position="end", fov_deg=80.0)
    processor.save_pretrained(tmp_path)
    loaded = PanoramaProcessor.from_pretrained(tmp_path)
    ours, theirs = processor.to_dict(), loaded.to_dict()
    ours.pop("auto_map"), theirs.pop("auto_map", None)
    assert theirs == ours
    assert loaded.chat_template == processor.chat_template
    a = processor(images=panoramas[0], text="<image>x", return_tensors="pt")
    b = loaded(images=panoramas[0], text="<image>x", return_tensors="pt")
    for key in a:
        torch.testing.assert_close(a[key], b[key])


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are opened, in order; one that is opened while an earlier one is open is an error."""
    names, files, real = [], [], builtins.open

    def record(file, *arguments, **options):
        result = real(file, *arguments, **options)
        if str(file).endswith((".jpg", ".png", ".tiff")):
            assert all(earlier.closed for earlier in files), f"{file} is opened beside another one"
            names.append(str(file))
            files.append(result)
        return result

    monkeypatch.setattr(builtins, "open", record)
    monkeypatch.setattr(io, "open", record)
    return names


@pytest.mark.parametrize("cached", [False, True])
def test_each_file_is_opened_once_and_alone_on_its_way_to_model_inputs(make, panoramas, tmp_path, opened, cached):
    _, processor = make()
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.png", "c.tiff")]
    for path, panorama in zip(paths, panoramas, strict=False):
        panorama.save(path)
    expected = processor(images=paths, text=["<image>?"] * 3, return_tensors="pt")["pixel_values"]
    processor.image_processor.cache_dir = tmp_path / "cache" if cached else None
    conversations = [chat("?", panorama=path) for path in paths]
    for _ in range(2):
        opened.clear()
        inputs = processor(images=paths, text=["<image>?"] * 3, return_tensors="pt")
        assert opened == paths
        torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=1 / 127.5)
    opened.clear()
    processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt")
    processor.apply_chat_template(conversations, return_labels=True)
    assert opened == 2 * paths


def test_every_kind_of_source_counts_as_one_panorama(make, panoramas, tmp_path):
    _, processor = make()
    panoramas[0].save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [str(tmp_path / "a.png"), tmp_path / "a.png", data, {"bytes": data, "path": None}, io.BytesIO(data), url]
    expected = processor(images=panoramas[0], text="<image>?", return_tensors="pt")
    for source in sources:
        for images in (source, [source], [[source]]):
            inputs = processor(images=images, text="<image>?", return_tensors="pt")
            assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
            assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_only_urls_are_fetched_and_lists_keep_their_nesting(make, panoramas, tmp_path):
    _, processor = make()
    data = io.BytesIO()
    panoramas[0].save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    given = [["missing.png", url], [tmp_path], [panoramas[1], data]]
    fetched = processor.image_processor.fetch_images(given)
    assert fetched == [["missing.png", fetched[0][1]], [tmp_path], [panoramas[1], data]]
    assert fetched[0][1] == data.getvalue()


@pytest.mark.parametrize("data", ["A" * 100_001, base64.b64encode(b"no image" * 10_000).decode()])
def test_a_broken_data_url_is_named_and_not_repeated(make, data):
    _, processor = make()
    with pytest.raises(ValueError, match="cannot read") as error:
        processor(images="data:image/png;base64," + data, text="<image>?")
    assert len(str(error.value)) < 300


def test_a_missing_or_broken_file_is_named(make, tmp_path):
    _, processor = make()
    with pytest.raises(FileNotFoundError, match="missing.png"):
        processor(images=str(tmp_path / "missing.png"), text="<image>?")
    (tmp_path / "broken.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"cannot read .*broken.png: it holds a web page"):
        processor(images=str(tmp_path / "broken.png"), text="<image>?")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("fov_degree", "fov_deg"), ("fov", "fov_deg"), ("overlap", "overlap_ratio"), ("pitch", "pitch_rows")],
)
def test_a_misspelled_option_of_the_views_is_an_error_of_the_whole_processor_too(make, panoramas, wrong, meant):
    _, processor = make()
    message = f"unknown option '{wrong}' of PanoramaProcessor, did you mean '{meant}'"
    with pytest.raises(ValueError, match=message):
        processor(images=panoramas[0], text="<image>?", **{wrong: 0.3})
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(
            chat("?", panorama=panoramas[0]), tokenize=True, return_dict=True, processor_kwargs={wrong: 0.3}
        )
    with pytest.raises((TypeError, ValueError), match=wrong):
        processor(images=panoramas[0], text="<image>?", images_kwargs={wrong: 0.3})
    processor(images=panoramas[0], text="<image>?", padding="longest", fov_deg=60.0, return_tensors="pt")


def test_places_are_taken_from_texts_and_from_ids(make):
    _, processor = make()
    answer = "dog: [12, -5, 20, 10]"
    expected = [NamedPlace("dog", BFoV(12, -5, 20, 10))]
    assert processor.post_process_grounding(answer) == [expected]
    assert processor.post_process_grounding([answer, "none", answer]) == [expected, [], expected]
    ids = processor.tokenizer(answer, return_tensors="pt")["input_ids"]
    assert processor.post_process_grounding(ids) == processor.post_process_grounding(ids[0].tolist())
    decoded = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert processor.post_process_grounding(ids)[0] == read_places(decoded)
    assert processor.post_process_grounding([]) == []


@pytest.mark.parametrize(
    ("text", "answer", "steps"),
    [
        ("left", "left", ""),
        ("<think>h1 - h2 = h71</think>left", "left", "h1 - h2 = h71"),
        ("<think> a </think> b <think>c</think> left ", "left", "a </think> b  c"),
        ("a</think>left", "left", "a"),  # a chat template may have opened them
        ("", "", ""),
    ],
)
def test_answers_are_told_apart_from_their_steps(make, text, answer, steps):
    _, processor = make()
    assert processor.post_process_answer(text) == [(answer, steps)]
    assert processor.post_process_answer([text, "x"]) == [(answer, steps), ("x", "")]
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not ids or processor.post_process_answer(torch.tensor(ids)) == [(answer, steps)]


def test_steps_that_never_end_give_no_answer_and_that_is_said(make):
    _, processor = make()
    with pytest.warns(UserWarning, match="raise max_new_tokens"):
        assert processor.post_process_answer("<think>h1 - h2 =") == [("", "h1 - h2 =")]
    places = "<think>[1, 2, 3, 4]</think>[10, 20, 30, 40]"
    ((found,),) = processor.post_process_grounding(places)
    assert found.place == (10, 20, 30, 40)


def test_a_tokenizer_that_pads_by_itself_is_asked_how(make):
    _, processor = make()
    processor.tokenizer.init_kwargs.update(padding="max_length", max_length=9)
    processor.tokenizer.padding = "max_length"
    assert processor(text=["north", "sky"], max_length=9, return_tensors="pt")["input_ids"].shape == (2, 9)


def test_what_is_saved_of_a_processor_is_what_it_says_of_itself(make, tmp_path):
    _, processor = make()
    processor.save_pretrained(tmp_path)
    assert type(processor).from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_empty_lists_of_videos_and_sounds_are_nothing_and_others_are_refused(make):
    _, processor = make()
    plain = processor(text="north", return_tensors="pt")
    given = processor(text="north", images=[], videos=[], audios=[], return_tensors="pt")
    assert given.keys() == plain.keys() and torch.equal(given["input_ids"], plain["input_ids"])
    for name in ("videos", "audio", "audios"):
        with pytest.raises(ValueError, match=f"takes images and text, got {name}"):
            processor(text="north", **{name: [torch.zeros(3)]})
