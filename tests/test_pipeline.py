"""The pipeline that travels with a model."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaPipeline, PanoramaVLM
from panorama_vlm.ask import main
from panorama_vlm.configuration_panorama import CUSTOM_PIPELINES, PIPELINE_TASK, PanoramaConfig
from panorama_vlm.image_processing_panorama import join_views
from panorama_vlm.pipeline_panorama import PROMPTS
from panorama_vlm.places_panorama import BFoV, NamedPlace
from panorama_vlm.tests.launching import SAMPLES
from panorama_vlm.tests.test_reading import crop_values, encoded, photo_sphere
from torch.utils.data import Dataset
from transformers import AutoConfig, pipeline

SHORT = {"max_new_tokens": 6}
PLACE = "[30, -10, 20, 12]"


def half_of(panorama):
    """The 180 degrees around the front, as a file that says so."""
    part = panorama.crop((128, 0, 384, 256))
    return encoded(part, "JPEG", xmp=photo_sphere(**crop_values((512, 256), (256, 256), 0, 128)))


def words(prompt):
    return re.search(r"User: (.*)\nAssistant:", prompt, re.S)[1]


# Asking


def test_batches_say_what_each_says_alone(pipe, panoramas):
    """Of whole and partial panoramas, with and without further views, and questions of other lengths."""
    partial = half_of(panoramas[2])
    closer = [{"type": "image", "image": panoramas[3], "further_views": [(30, -10, 40)]}]
    inputs = [
        {"panorama": panoramas[0], "question": "Where?"},
        {"image": panoramas[1], "text": "What is to the left of the bridge, and what behind me?"},
        {"panorama": partial, "question": "What is there?"},
        [{"role": "user", "content": [*closer, {"type": "text", "text": "And here?"}]}],
        [{"role": "user", "content": "Is anybody there?"}],
    ]
    alone = [pipe(each, **SHORT) for each in inputs]
    assert len({each["answer"] for each in alone}) > 1
    assert pipe(inputs, **SHORT) == pipe(inputs, batch_size=3, **SHORT) == pipe(inputs, batch_size=5, **SHORT) == alone
    assert alone[3]["looked_at"] == [(30.0, -10.0, 40.0)] and alone[0]["looked_at"] == []
    messages = [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "Where?"}]
    chat = [{"role": "user", "content": messages}]
    assert pipe(chat, **SHORT) == alone[0] == pipe(panoramas[0], "Where?", **SHORT)


def test_an_answer_is_what_generate_says(pipe, ask, panoramas):
    inputs = ask(pipe.processor, panoramas[0], "Where?")
    ids = pipe.model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = pipe.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert pipe.ask(panoramas[0], "Where?", **SHORT) == expected
    assert pipe.ask(panoramas[:1], "Where?", generate_kwargs=SHORT) == [expected]
    defaults = PanoramaPipeline(pipe.model, processor=pipe.processor, device="cpu", **SHORT)
    assert defaults.ask(panoramas[0], ["Where?", "Where?"]) == [expected] * 2


def test_a_model_in_half_precision_answers_in_batches_too(pipe, panoramas):
    pipe.model.to(torch.bfloat16)
    assert len(pipe.ask(panoramas[:2], "Who?", batch_size=2, **SHORT)) == 2


def test_views_of_several_join_as_they_are_made_together(pipe, panoramas):
    processor = pipe.processor.image_processor
    views = [[], [(0, 0, 40), (90, 10, 30)], [(5, 5, 50)]]
    images = [panoramas[0], half_of(panoramas[1]), panoramas[2]]
    together = processor(images, return_tensors="pt", further_views=views)
    each = [
        processor([image], return_tensors="pt", **({"further_views": [own]} if own else {}))
        for image, own in zip(images, views, strict=True)
    ]
    joined = join_views(each)
    assert set(joined) == set(together) == {"pixel_values", "view_mask", "further_views"}
    for name, value in together.items():
        torch.testing.assert_close(joined[name], torch.as_tensor(np.stack(value)), equal_nan=True)
    assert join_views([]) == {}


def test_what_comes_in_as_an_iterator_is_read_as_it_goes(pipe, said, panoramas):
    said(lambda prompt: f"{words(prompt)} {PLACE}")
    read = []

    def source():
        for number in range(6):
            read.append(number)
            yield panoramas[number]

    for verb in (pipe.point, pipe.detect):
        read.clear()
        found = verb(source(), "cat", batch_size=2)
        assert [each.place for each in next(found)] == [BFoV(30, -10, 20, 12)]
        assert len(read) <= 5
        assert len(list(found)) == 5 and len(read) == 6
    read.clear()
    answers = pipe.ask(source(), "Who?", look_twice=True)
    assert next(answers) == f"Who? {PLACE}" and len(read) <= 3
    assert len(list(answers)) == 5
    assert list(pipe.ask(map(str, SAMPLES.glob("[ab]*.jpg")), iter(["a", "b"])))[1].startswith("b ")
    assert pipe([]) == [] and list(pipe(iter([]), "Who?")) == [] and pipe.point([], "cat") == []


class Questions(Dataset):
    def __init__(self, panoramas):
        self.panoramas = panoramas

    def __len__(self):
        return len(self.panoramas)

    def __getitem__(self, number):
        return {"panorama": self.panoramas[number], "question": f"q{number}"}


def test_a_data_set_of_questions_is_answered_in_batches(pipe, said, panoramas):
    said(words)
    found = pipe(Questions(panoramas[:3]), batch_size=2)
    assert [each["answer"] for each in found] == ["q0", "q1", "q2"]


def test_what_cannot_be_asked_is_named(pipe, make, panoramas):
    with pytest.raises(ValueError, match="3 questions for 2 panoramas"):
        pipe.ask(panoramas[:2], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"must hold 'panorama' and 'question', or 'messages', got \['question'\]"):
        pipe({"question": "Where?"})
    with pytest.raises(ValueError, match="a chat holds its question"):
        pipe([{"role": "user", "content": "a"}], "b")
    with pytest.raises(ValueError, match="stream=True gives the pieces of one answer"):
        pipe.ask(panoramas[:2], "a", stream=True)
    with pytest.raises(ValueError, match="directions must be positive, got 0"):
        pipe.describe(panoramas[0], 0)
    with pytest.raises(ValueError, match="geojson, coco.*got 'csv'"):
        pipe.export(panoramas[0], [], "csv")
    with pytest.raises(ValueError, match="unknown option 'pointt' of the prompts"):
        PanoramaPipeline(pipe.model, processor=pipe.processor, prompts={"pointt": ""})
    with pytest.raises(ValueError, match="needs the processor"):
        PanoramaPipeline(pipe.model)
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        pipe(panoramas[0], "a", do_sample=True, num_return_sequences=2, **SHORT)
    with pytest.raises(FileNotFoundError):
        pipe("no-such.jpg", "a")


# Streaming


@pytest.mark.parametrize("number", range(3))
def test_the_pieces_of_an_answer_are_the_answer(pipe, panoramas, number):
    question = ["Where?", "What is there?", "Who was it?"][number]
    options = {"max_new_tokens": 24, "do_sample": number > 0, "eos_token_id": -1, "batch_size": 2}
    torch.manual_seed(number)
    whole = pipe.ask(panoramas[number], question, **options)
    torch.manual_seed(number)
    pieces = list(pipe.ask(panoramas[number], question, stream=True, **options))
    assert "".join(pieces) == whole and len(pieces) > 3 and all(pieces)


def says(pipe, monkeypatch, text, wait=None):
    """The model says a text token by token."""
    ids = pipe.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def generate(input_ids, streamer=None, stopping_criteria=(), **_):
        said = []
        if streamer is not None:
            streamer.put(input_ids)
        for token in ids:
            if any(bool(stop(input_ids, None).all()) for stop in stopping_criteria):
                break
            said.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
                if wait is not None:
                    wait(said)
        return SimpleNamespace(text=[pipe.processor.tokenizer.decode(said).strip()], generated_ids=input_ids[:, :2])

    monkeypatch.setattr(pipe.model, "generate", generate)


@pytest.mark.parametrize(
    "text",
    [
        "<think>h1 red ball </think>two of them",
        "  <think>h1</think>  here: 猫, 🐈‍⬛ and a café  ",
        "a < b, <thin ice> and so on",
        "<th",
        "",
        "line one\nline two \n\n end ",
    ],
)
def test_steps_and_half_characters_are_not_streamed(pipe, panoramas, monkeypatch, text):
    says(pipe, monkeypatch, text)
    whole = pipe.ask(panoramas[0], "Who?")
    pieces = list(pipe.ask(panoramas[0], "Who?", stream=True))
    assert "".join(pieces) == whole and "\ufffd" not in whole
    assert not any("think>" in piece or "h1" in piece for piece in pieces)


def test_steps_that_the_template_opens_are_not_streamed_either(make, panoramas, monkeypatch):
    model, processor = make()
    processor.chat_template = processor.chat_template.replace("Assistant:' }}", "Assistant:<think>' }}")
    pipe = PanoramaPipeline(model, processor=processor, device="cpu")
    says(pipe, monkeypatch, "one, two</think>three")
    assert "".join(pipe.ask(panoramas[0], "Who?", stream=True)) == "three" == pipe.ask(panoramas[0], "Who?")


def test_whoever_stops_listening_stops_the_model(pipe, panoramas, monkeypatch):
    free, spoken = threading.Semaphore(3), []

    def wait(said):
        spoken.append(len(said))
        free.acquire(timeout=0.2)

    says(pipe, monkeypatch, "one two three four five six seven eight nine ten", wait)
    before = set(threading.enumerate())
    pieces = pipe.ask(panoramas[0], "Who?", stream=True)
    next(pieces)
    pieces.close()
    assert len(spoken) <= 5 and set(threading.enumerate()) == before


def test_an_error_while_it_speaks_is_raised_where_it_is_read(pipe, panoramas, monkeypatch):
    def generate(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.model, "generate", generate)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pipe.ask(panoramas[0], "Who?", stream=True))
    with pytest.raises(ValueError, match="cannot read"):
        list(pipe.ask(b"no picture", "Who?", stream=True))


# Places


def test_point_and_detect_ask_as_the_model_learned_it(pipe, said, panoramas):
    said(lambda prompt: "[[1, 2, 3, 4], [5, 6, 7, 8]]" if "List" in prompt else f"the cat is at {PLACE}")
    assert pipe.point(panoramas[0], "red cube") == [NamedPlace("the cat", BFoV(30, -10, 20, 12))]
    found = pipe.detect(panoramas[0], ["box", "story", "dog", "toy"], batch_size=3)
    assert [each.label for each in found] == ["box", "box", "story", "story", "dog", "dog", "toy", "toy"]
    assert {each.place for each in found} == {BFoV(1, 2, 3, 4), BFoV(5, 6, 7, 8)}
    asked = [words(each.prompt) for each in said.asked]
    assert asked[0] == "Where exactly is the red cube? Answer with [yaw, pitch, x_fov, y_fov] in degrees."
    kinds = [re.search("all (.*?) from", text)[1] for text in asked[1:]]
    assert kinds == ["boxes", "stories", "dogs", "toys"]
    assert "[] if none." in asked[1]
    said(lambda prompt: "[]")
    assert pipe.detect(panoramas[0], "dog") == [] and pipe.point(panoramas[:2], "dog") == [[], []]
    said(lambda prompt: '{"bfov": [1, 2, 3, 4], "score": 0.5}')
    assert pipe.point(panoramas[0], "{x} dog") == [NamedPlace("{x} dog", BFoV(1, 2, 3, 4), 0.5)]


def test_of_a_list_that_was_cut_off_it_is_said(pipe, panoramas):
    with pytest.warns(UserWarning, match="the answer about dog, cat was cut off, and places may be missing"):
        pipe.detect(panoramas[0], ["dog", "cat"], max_new_tokens=2, eos_token_id=-1, batch_size=2)
    found = pipe(panoramas[:2], "Who?", max_new_tokens=8, eos_token_id=-1)
    assert [each["cut_off"] for each in found] == [True, True]
    ended = pipe(panoramas[:2], "Who?", max_new_tokens=8, eos_token_id=list(range(600)), batch_size=2)
    assert [each["cut_off"] for each in ended] == [False, False]


def test_the_default_words_are_those_that_the_synthetic_world_teaches():
    from panorama_vlm.synthetic.write import World

    learned = set()
    world = World(3, questions=40, kinds=("grounding", "grounding_all", "caption_direction"))
    for number in range(12):
        learned |= {question.words for question in world.ask(world.scene(number))}
    for name in ("point", "detect", "describe"):
        pattern = re.escape(PROMPTS[name]).replace(r"\{what\}", ".+").replace(r"\{all\}", ".+s")
        assert any(re.fullmatch(pattern, words) for words in learned), name


def file_of(image, **values):
    size = image.size
    return encoded(image, "JPEG", xmp=photo_sphere(**crop_values(size, size, 0, 0, **values)))


def test_directions_are_described_with_the_panorama_turned_to_each(pipe, said, panoramas):
    said(lambda prompt: "a tree")
    found = pipe.describe(panoramas[0], 4, batch_size=3)
    assert [tuple(each[:3]) for each in found] == [
        (0, None, "front"),
        (90, None, "right"),
        (-180, None, "back"),
        (-90, None, "left"),
    ]
    assert [str(each) for each in found][1] == "right (90°): a tree"
    assert {words(each.prompt) for each in said.asked} == {PROMPTS["describe"]}
    said.asked.clear()
    pipe.describe(panoramas[0], [0, 77.5], prompt="And here?")
    turned = pipe.processor.image_processor(panoramas[:1], return_tensors="pt", yaw_offsets=[77.5])["pixel_values"]
    torch.testing.assert_close(said.asked[1].pixel_values, turned)
    assert words(said.asked[1].prompt) == "And here?"


def test_bearings_come_from_the_file_that_says_where_north_is(pipe, said, panoramas):
    said(lambda prompt: "a tree")
    file = file_of(panoramas[0], PoseHeadingDegrees=200.0)
    found = pipe.describe(file)
    assert [each.bearing for each in found] == [200, 245, 290, 335, 20, 65, 110, 155]
    names = ["south", "south-west", "west", "north-west", "north", "north-east", "east", "south-east"]
    assert [each.name for each in found] == names and str(found[0]) == "south (200°): a tree"
    pipe.processor.image_processor.align_heading = True  # then the front is north
    assert [(each.bearing, each.name) for each in pipe.describe([file], 2)[0]] == [(0, "north"), (180, "south")]


def test_where_the_camera_did_not_look_nothing_is_asked(pipe, said, panoramas):
    said(lambda prompt: "a tree")
    found = pipe.describe(half_of(panoramas[0]), 4)
    assert [each.text for each in found] == ["a tree", "a tree", None, "a tree"]
    assert str(found[2]) == "back (180°): not in the picture" and len(said.asked) == 3


# Looking twice


def test_the_second_look_is_where_the_model_says(pipe, said, panoramas):
    said(lambda prompt: PLACE if "x_fov" in prompt else "a cat")
    found = pipe(panoramas[0], "What is on the wall?", look_twice=True)
    first, second = said.asked
    assert words(first.prompt) == "What is on the wall?\nAnswer with [yaw, pitch, x_fov, y_fov] in whole degrees."
    assert words(second.prompt) == "What is on the wall?" and found["answer"] == "a cat"
    ((yaw, pitch, fov),) = found["looked_at"]
    assert (yaw, pitch) == (30, -10) and 30 <= fov <= 60
    assert second.further_views.tolist() == [[[yaw, pitch, pytest.approx(fov)]]]
    closer = pipe.processor.image_processor(panoramas[:1], return_tensors="pt", further_views=[[(yaw, pitch, fov)]])
    torch.testing.assert_close(second.pixel_values, closer["pixel_values"])
    assert not hasattr(first, "further_views")
    said.asked.clear()
    assert pipe.ask(panoramas[0], "What is it?", look_twice="red cube") == "a cat"
    assert words(said.asked[0].prompt) == PROMPTS["point"].format(what="red cube")
    said.asked.clear()
    assert pipe.point(panoramas[0], "red cube", look_twice=True)[0].place == BFoV(30, -10, 20, 12)
    assert words(said.asked[0].prompt) == words(said.asked[1].prompt) and hasattr(said.asked[1], "further_views")


def test_where_the_question_names_a_place_nothing_is_asked_first(pipe, said, panoramas):
    said(lambda prompt: PLACE if "x_fov" in prompt else "a cat")
    questions = ["What is at [50, 10, 4, 4]?", "Who?", "What is at [-50, 0, 4, 4] (yaw, pitch, x_fov, y_fov)?"]
    for inputs in (panoramas[:3], iter(panoramas[:3])):
        said.asked.clear()
        found = list(pipe(inputs, questions, look_twice=True))
        assert [each["looked_at"][0][0] for each in found] == [50, 30, -50]
        assert sum(not hasattr(each, "further_views") for each in said.asked) == 1


def test_who_names_no_place_answers_at_one_look(pipe, said, panoramas):
    said(lambda prompt: PLACE if "Who" in prompt and "x_fov" in prompt else "nobody")
    found = pipe(panoramas[:2], ["Who?", "Where?"], look_twice=True, batch_size=2)
    assert [len(each["looked_at"]) for each in found] == [1, 0]
    assert [each["answer"] for each in found] == ["nobody", "nobody"]
    chat = [
        {"role": "user", "content": [{"type": "image", "image": panoramas[0]}, {"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
    ]
    assert len(pipe(chat, look_twice=True)["looked_at"]) == 1
    assert "further_views" not in chat[0]["content"][0]
    assert pipe([{"role": "user", "content": "Who?"}], look_twice=True)["looked_at"] == []


def test_two_looks_of_a_real_model_are_one_batch_too(pipe, panoramas, monkeypatch):
    """Whatever a random model says, the second question is the first with further views."""
    monkeypatch.setattr("panorama_vlm.pipeline_panorama.read_places", lambda text: [NamedPlace("", BFoV(5, 5, 9, 9))])
    together = pipe(panoramas[:3], "Who?", look_twice=True, batch_size=3, **SHORT)
    assert together == [pipe(panorama, "Who?", look_twice=True, **SHORT) for panorama in panoramas[:3]]
    assert "".join(pipe.ask(panoramas[0], "Who?", look_twice=True, stream=True, **SHORT)) == together[0]["answer"]


# Handing on


def test_places_go_out_as_the_processor_shows_the_panorama(pipe, panoramas, tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(file_of(panoramas[0], PoseHeadingDegrees=90.0))
    places = [NamedPlace("cat", BFoV(10, 0, 20, 20))]
    spot = pipe.export(str(file), places, "pannellum")
    assert spot["panorama"] == str(file) and spot["hotSpots"][0]["yaw"] == 10
    assert pipe.export(str(file), places, "photo_sphere_viewer", "b.jpg")["panorama"] == "b.jpg"
    assert pipe.export(str(file), places, "coco")["images"][0]["width"] == 512
    made = pipe.export(str(file), places, "geojson", position=(1.0, 2.0))
    assert made["features"][0]["properties"]["bearing"] == 100
    pipe.processor.image_processor.align_heading = True  # the place is 10 degrees east of north now
    assert pipe.export(str(file), places, "pannellum")["hotSpots"][0]["yaw"] == -80
    assert pipe.export(str(file), places, "geojson", position=(1, 2))["features"][0]["properties"]["bearing"] == 10
    drawn = pipe.export(str(file), places, "drawing", width=256)
    assert drawn.size == (256, 128)
    (crop,) = pipe.export(str(file), places, "crops", size=64)
    assert crop.size == (64, 64)
    content = base64.b64encode(file.read_bytes()).decode()
    for source in (panoramas[0], file.read_bytes(), content, f"data:image/jpeg;base64,{content}"):
        assert pipe.export(source, places, "pannellum")["panorama"] == ""
    assert pipe.export(file, places, "pannellum")["panorama"] == str(file)


# Travelling


def test_the_configuration_names_the_pipeline_whatever_was_made_of_it(pipe, tmp_path):
    config = pipe.model.config
    config.custom_pipelines[PIPELINE_TASK]["pt"] = (PanoramaVLM,)  # as `transformers.pipeline` does
    config.custom_pipelines = {}
    assert config.custom_pipelines == CUSTOM_PIPELINES == json.loads(config.to_json_string())["custom_pipelines"]
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, PanoramaConfig) and again.custom_pipelines == CUSTOM_PIPELINES
    assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())


def test_with_the_package_a_loaded_model_makes_one_by_its_task(pipe, panoramas):
    made = pipeline(PIPELINE_TASK, model=pipe.model, processor=pipe.processor, device="cpu")
    assert type(made) is PanoramaPipeline
    assert made.ask(panoramas[0], "Who?", **SHORT) == pipe.ask(panoramas[0], "Who?", **SHORT)


ALONE = """
import json, sys
from transformers import pipeline

folder, panorama, again, task = sys.argv[1:]
pipe = pipeline(model=folder, trust_remote_code=True, device="cpu")
pipe.save_pretrained(again)
pipe = pipeline(task, model=again, trust_remote_code=True, device="cpu")
assert "panorama_vlm" not in sys.modules
places = pipe.point(panorama, "cat", max_new_tokens=3)
print()
print(json.dumps([
    pipe.ask(panorama, "Who?", max_new_tokens=6),
    "".join(pipe.ask(panorama, "Who?", max_new_tokens=6, stream=True)),
    len(pipe.describe(panorama, 2, max_new_tokens=3)),
    pipe.export(panorama, places, "pannellum")["type"],
]))
"""


@pytest.mark.slow
def test_a_process_without_the_package_finds_it_with_and_without_its_task(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    park = str(SAMPLES / "park.jpg")
    command = [sys.executable, "-P", "-c", ALONE, str(tmp_path / "model"), park, str(tmp_path / "again"), PIPELINE_TASK]
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    answer = pipe.ask(park, "Who?", **SHORT)
    assert json.loads(run.stdout.splitlines()[-1]) == [answer, answer, 2, "equirectangular"]
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("model", "again")]
    assert names[0] == names[1] and "pipeline_panorama.py" in names[0] and "processor_config.json" in names[0]


def test_a_saved_model_alone_has_the_code_of_the_pipeline(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    assert {"pipeline_panorama.py", "exports_panorama.py", "processing_panorama.py"} <= set(os.listdir(tmp_path))


def test_the_page_of_places_does_what_it_says(pipe, tmp_path, monkeypatch, capsys):
    page = (SAMPLES.parent / "docs/places.md").read_text()
    pipe.save_pretrained(tmp_path / "build/demo/finetune")
    (tmp_path / "samples").symlink_to(SAMPLES)
    monkeypatch.chdir(tmp_path)

    def generate(self, input_ids, tokenizer=None, streamer=None, **_):
        if streamer is not None:
            streamer.put(input_ids)
            streamer.put(torch.tensor(tokenizer("a tree")["input_ids"]))
        prompts = tokenizer.batch_decode(input_ids)
        texts = [PLACE if "x_fov" in prompt else "a tree" for prompt in prompts]
        return SimpleNamespace(text=texts, generated_ids=input_ids[:, :2])

    monkeypatch.setattr(PanoramaVLM, "generate", generate)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    out = capsys.readouterr().out
    assert "front-right (45°): a tree" in out and '"yaw": 30' in out
    assert names["found"]["looked_at"] == [(30, -10, 30)]
    assert names["voted"]["votes"] == ["a tree"] * 8 and names["voted"]["agreement"] == 1
    assert names["bearings"]["features"][0]["properties"]["bearing"] == 150
    made = {path.name for path in tmp_path.glob("park*")}
    assert made == {"park-places.jpg", "park-0.jpg"}
    (commands,) = re.findall(r"```\n(python -m panorama_vlm\.ask .*?)```", page, re.S)
    for command in commands.splitlines():
        main(shlex.split(command)[3:])
    assert "red cube: [30, -10, 20, 12]" in capsys.readouterr().out
    made = {path.name for path in (*tmp_path.glob("park.*"), *tmp_path.glob("crops/*"))}
    forms = {f"park.{ending}" for ending in ("pannellum.json", "psv.json", "coco.json", "png", "geojson")}
    assert made == {*forms, "01-cube.jpg"}
