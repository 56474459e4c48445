"""Augmentation, against scenes whose things were moved: pixels, answers and labels."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from panorama_vlm.data.augmentation import Augmentation, augmented, knowledge_of, missing_knowledge
from panorama_vlm.data.collators import ConversationCollator, Labelled, VisionCollator
from panorama_vlm.data.rows import BadSample, messages_of
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.image_processing_panorama import PanoramaImageProcessor, Shown
from panorama_vlm.places_panorama import BFoV, bfov_iou, mirrored_words, moved_places, read_places
from panorama_vlm.sampling_panorama import tilted_pixels, view_mask
from panorama_vlm.synthetic.questions import KINDS, Question, Seen
from panorama_vlm.synthetic.render import look
from panorama_vlm.synthetic.scenes import Scene
from panorama_vlm.synthetic.write import World, row_of
from panorama_vlm.train.checks import check_run
from panorama_vlm.train.config import TrainConfig, load_config
from panorama_vlm.train.fingerprint import fingerprint
from PIL import Image
from scipy.spatial.transform import Rotation

WORLD = World(seed=11, width=256, questions=21)


def moved_scene(scene: Scene, heading: float, mirrored: bool) -> Scene:
    """The scene around an observer who has turned to the right, its x axis reversed after that. Cut-outs face the eyes;
    solids turn along."""
    a = math.radians(heading)

    def position(x, y, z):
        x, z = x * math.cos(a) - z * math.sin(a), x * math.sin(a) + z * math.cos(a)
        return (-x if mirrored else x, y, z)

    def turn(of):
        return -(of - heading) if mirrored else of - heading

    yaw, pitch = scene.sun
    things = tuple(replace(t, position=position(*t.position), turn=turn(t.turn)) for t in scene.things)
    return look(replace(scene, things=things, sun=(turn(yaw), pitch)))


def said(messages):
    """The questions with their answers."""
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    return list(zip(texts[::2], texts[1::2], strict=True))


SHOWN = [Shown(45.0), Shown(270.0), Shown(0.0, True), Shown(135.0, True)]


@pytest.mark.parametrize("shown", SHOWN)
def test_answers_are_those_of_the_scene_that_was_moved(shown):
    """Every question that is left is asked again about the moved scene, with the words it has now: the oracle, made to
    speak of the same things, gives the same answer."""
    checked: dict[str, int] = {}
    for number in range(40):
        scene = WORLD.scene(number)
        row = row_of(scene, WORLD.ask(scene), "x.jpg")
        found = augmented(messages_of(row["conversations"], ["x.jpg"]), knowledge_of(row), shown)
        if found is None:
            continue
        again = Seen(moved_scene(scene, shown.yaw_offset, shown.mirrored), np.random.default_rng(0))
        by_words = {question: kind for question, kind in zip(row["questions"], row["kinds"], strict=True)}
        for question, answer in said(found):
            kind = next(
                kind
                for words, kind in by_words.items()
                if words in question or mirrored_words(words) in question  # a question may have been mirrored
            )
            if wanted := expected(kind, question, again):
                if read_places(wanted):
                    pairs = list(zip(read_places(wanted), read_places(answer), strict=True))
                    assert all(bfov_iou(a.place, b.place) > 0.7 for a, b in pairs), (question, answer, wanted)
                else:
                    assert answer.split(". ")[-1] == wanted, (question, answer, wanted)
                checked[kind] = checked.get(kind, 0) + 1
    assert {"direction", "grounding", "facing", "order", "colour", "grounding_all"} <= set(checked)
    assert ("what_is_in_direction" in checked) == (shown.yaw_offset == 0)
    if not shown.yaw_offset:
        assert "relation_3d" in checked


def expected(kind, question, seen):
    """What the oracle answers to just these words about a scene; it draws until it asks them, `None` where it never
    does."""
    for attempt in range(600):
        seen.random = np.random.default_rng(attempt)
        asked = KINDS[kind](seen)
        if asked is None:
            continue
        words = {asked.words}
        if kind == "order":  # on a turn to the left, what comes first on a turn to the right comes last
            if "turn to the left" in question and asked.words.replace("to the right", "to the left") == question:
                names = question.rstrip("?").split("the ")
                return next(n.removesuffix(" or ") for n in names[-2:] if n.removesuffix(" or ") != asked.answer)
        if kind in ("facing", "relation_3d"):  # names both sides, in either order
            words.add(mirrored_words(asked.words))
        if question.split("\n")[0] in words and all(f". {option}\n" in question for option in asked.options):
            return asked.answer
    return None


@pytest.mark.parametrize("shown", SHOWN)
def test_pixels_and_labels_are_those_of_the_scene_that_was_moved(shown, make):
    world = World(seed=12, width=512)
    number = next(n for n in range(20) if world.scene(n).panorama is None and len(world.scene(n).things) > 4)
    scene = world.scene(number)
    other = moved_scene(scene, shown.yaw_offset, shown.mirrored)
    (picture, maps), (wanted, wanted_maps) = world.labelled_picture(scene), world.labelled_picture(other)
    _, processor = make()
    cut = processor.image_processor
    options = {"yaw_offsets": [shown.yaw_offset], "mirrored": [shown.mirrored]}
    views = cut([picture], return_tensors="pt", **options)["pixel_values"]
    right, wrong = (cut([each], return_tensors="pt")["pixel_values"] for each in (wanted, picture))
    # The floor has a pattern of its own, which does not move along: things alone are compared, where labels are.
    collate = VisionCollator(processor, 0, None, False, Labelled((8, 8), ("name", "colour", "size")))
    found, again = {"pixel_values": views}, {"pixel_values": right}
    collate.add_labels(found, {"labels": maps}, shown)
    collate.add_labels(again, {"labels": wanted_maps})
    same = found["token_classes"] == again["token_classes"]
    assert same.float().mean() > 0.995
    places, others = found["token_places"], again["token_places"]
    both = places.isfinite().all(-1) & others.isfinite().all(-1)
    assert both.sum() > 20 and (both == others.isfinite().all(-1)).float().mean() > 0.995
    assert (places - others)[both].abs().median() < 0.02
    shows = again["token_classes"][..., 0].reshape(*views.shape[:2], 8, 8) > 0
    shows = shows.repeat_interleave(views.shape[3] // 8, 2).repeat_interleave(views.shape[4] // 8, 3)[:, :, None]
    apart, before = (((each - right).abs() * shows).sum() / shows.sum() for each in (views, wrong))
    assert apart < 0.35 * before


def test_pixels_are_exact_and_the_order_is_turn_then_mirror(panoramas):
    cut = PanoramaImageProcessor(image_size=64)
    array = np.asarray(panoramas[0])
    by_hand = np.roll(array, -array.shape[1] // 8, axis=1)[:, ::-1].copy()
    found = cut([array], return_tensors="pt", yaw_offsets=[45.0], mirrored=[True])["pixel_values"]
    torch.testing.assert_close(found, cut([by_hand], return_tensors="pt")["pixel_values"], rtol=0, atol=0)
    tilted = cut([array], return_tensors="pt", yaw_offsets=[45.0], mirrored=[True], tilts=[(4.0, -3.0)])["pixel_values"]
    by_hand = tilted_pixels(by_hand, 4.0, -3.0)
    # Resampled once instead of twice: sharper, at the same place.
    assert (tilted - cut([by_hand], return_tensors="pt")["pixel_values"]).abs().mean() < 0.02
    assert (tilted - found).abs().mean() > 0.05


def test_partial_panoramas_stay_partial(tmp_path):
    """What the camera saw moves along: a band in yaw 40 to 160 degrees, seen by its colour and by the mask."""
    cut = PanoramaImageProcessor(image_size=32, view_strategy="cubemap")
    generator = np.random.default_rng(0)
    white = Image.fromarray(generator.integers(200, 256, (96, 240, 3), dtype=np.uint8))
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" GPano:FullPanoWidthPixels="720" '
        'GPano:FullPanoHeightPixels="360" GPano:CroppedAreaImageWidthPixels="240" '
        'GPano:CroppedAreaImageHeightPixels="96" GPano:CroppedAreaLeftPixels="440" GPano:CroppedAreaTopPixels="132"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    white.save(tmp_path / "part.jpg", xmp=xmp.encode())
    for options in ({}, {"mirrored": [True]}, {"yaw_offsets": [90.0], "mirrored": [True]}, {"tilts": [(0.0, 30.0)]}):
        found = cut([str(tmp_path / "part.jpg")], return_tensors="pt", **options)
        bright = (found["pixel_values"][0] > 0.3).flatten(1).any(1)
        assert found["view_mask"][0].tolist() == bright.tolist(), options
        assert 0 < int(bright.sum()) < len(bright)
    plan = cut.view_plan
    assert view_mask(plan, (0.4, 0.6, 0.2, 0.3), np.eye(3)).tolist() == view_mask(plan, (0.4, 0.6, 0.2, 0.3)).tolist()


def test_a_tilt_is_the_rotation_of_the_camera():
    """A bright spot comes to where scipy's rotation brings its direction."""
    yaw, pitch, up, lean = 50.0, 20.0, 7.0, -12.0
    picture = np.zeros((180, 360, 3), np.uint8)
    picture[round((90 - pitch) - 0.5), round(yaw + 180 - 0.5)] = 255
    found = tilted_pixels(picture, up, lean)[..., 0].astype(float)
    row, column = (float((found * place).sum() / found.sum()) for place in np.mgrid[:180, :360])
    a, b = math.radians(pitch), math.radians(yaw)
    ray = np.array([math.cos(a) * math.sin(b), math.sin(a), math.cos(a) * math.cos(b)])  # right, up, ahead
    # Looking up turns ahead to up, about the axis to the right; leaning right turns up to the right, about ahead.
    camera = Rotation.from_rotvec([-up, 0, 0], degrees=True) * Rotation.from_rotvec([0, 0, -lean], degrees=True)
    x, y, z = camera.inv().apply(ray)
    assert column + 0.5 - 180 == pytest.approx(math.degrees(math.atan2(x, z)), abs=1)
    assert 90 - row - 0.5 == pytest.approx(math.degrees(math.asin(y)), abs=1)


def test_tilted_samples_say_only_what_a_tilt_does_not_change():
    left_over = set()
    for number in range(30):
        scene = WORLD.scene(number)
        row = row_of(scene, WORLD.ask(scene), "x.jpg")
        found = augmented(messages_of(row["conversations"], ["x.jpg"]), knowledge_of(row), Shown(tilt=(3.0, 2.0)))
        before = dict(zip(row["questions"], row["kinds"], strict=True))
        for question, answer in said(found or []):
            left_over.add(before[question.split("\n")[0]])
            assert [question, answer] in [list(pair) for pair in said(messages_of(row["conversations"], ["x.jpg"]))]
    assert left_over == {"existence", "colour", "shape", "size", "count", "nearest_of_four"}


def test_lists_of_places_stay_from_left_to_right():
    text = "[[-170, 5, 10, 8], [-20, 0, 10, 8], [100, 0, 10, 8]]"
    assert moved_places(text, 90.0) == "[[-110, 0, 10, 8], [10, 0, 10, 8], [100, 5, 10, 8]]"
    assert moved_places(text, 0.0, True) == "[[-100, 0, 10, 8], [20, 0, 10, 8], [170, 5, 10, 8]]"
    assert moved_places(text, 8.0) is None  # one is on the seam then
    assert moved_places("[[100, 0, 10, 8], [-20, 0, 10, 8]]", 90.0) is None  # in no such order
    assert moved_places("[[50, 0, 10, 8], [-179, 0, 10, 8]]", 90.0) == "[[-40, 0, 10, 8], [91, 0, 10, 8]]"
    assert moved_places("yaw=1 pitch=2 x_fov=3 y_fov=4", 90.0) is None
    assert moved_places("[]", 90.0) == "[]"
    assert moved_places("[[0, 75, 360, 30]]", 90.0) == "[[0, 75, 360, 30]]"  # all around
    assert BFoV(0, 75, 360, 30).turned(90) == BFoV(0, 75, 360, 30)
    assert mirrored_words("Front-left, BACK RIGHT, not leftover: behind, right") == (
        "Front-right, BACK LEFT, not leftover: behind, left"
    )


def conversation(**known):
    """A row with four questions, of which each rule is known."""
    pairs = [
        ("Where is it?", "front-left"),
        ("What is at the left?", "a cat"),
        ("How many?", "two"),
        ("Place?", "[9, 0, 5, 5]"),
    ]
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    knows = {"turns": ["direction", "no", "same", "place"], "mirrors": ["direction", "direction", "same", "place"]}
    return {"conversations": turns, **knows, **known}


def shown_as(shown, **known):
    row = conversation(**known)
    found = augmented(messages_of(row["conversations"], ["x.jpg"]), knowledge_of(row), shown)
    return None if found is None else said(found)


def test_rules_of_rows():
    turned = [("Where is it?", "left"), ("How many?", "two"), ("Place?", "[-36, 0, 5, 5]")]
    assert shown_as(Shown(45.0)) == turned
    assert shown_as(Shown(45.0), turns=json.dumps(conversation()["turns"])) == turned  # as tables of text hold it
    assert shown_as(Shown(10.0)) == [("How many?", "two"), ("Place?", "[-1, 0, 5, 5]")]
    mirrored = [
        ("Where is it?", "front-right"),
        ("What is at the right?", "a cat"),
        ("How many?", "two"),
        ("Place?", "[-9, 0, 5, 5]"),
    ]
    assert shown_as(Shown(mirrored=True)) == mirrored
    assert shown_as(Shown(45.0), turns=["no"] * 4) is None
    with pytest.raises(BadSample, match="'turns' must be a list of 4, one entry a question"):
        shown_as(Shown(45.0), turns=["same"])
    with pytest.raises(BadSample, match="'turns' must be of same, direction, place, no, got 3"):
        shown_as(Shown(45.0), turns=[3] * 4)
    # What nobody said how it moves is not taught: places under another rule, and steps.
    assert shown_as(Shown(45.0), turns=["no", "no", "no", "same"]) is None
    row = {**conversation(), "turns": ["no", "no", "same", "no"]}
    row["conversations"][5]["value"] = "<think>h3 , h9</think>two"
    assert augmented(messages_of(row["conversations"], ["x.jpg"]), knowledge_of(row), Shown(45.0)) is None


def test_the_image_goes_to_the_first_question_that_is_left():
    row = conversation(turns=["no", "no", "same", "place"])
    found = augmented(messages_of(row["conversations"], ["x.jpg"]), knowledge_of(row), Shown(45.0))
    image = {"type": "image", "image": "x.jpg", "yaw_offset": 45.0, "mirrored": False, "tilt": (0.0, 0.0)}
    assert found[0]["content"] == [image, {"type": "text", "text": "How many?"}]
    assert sum(part["type"] == "image" for message in found for part in message["content"]) == 1


def test_options_are_turned_with_the_answer_and_their_instruction_is_not():
    question = Question("direction", "Where is it?", "left", ("front", "left"), turns="direction")
    row = row_of(WORLD.scene(0), [question], "x.jpg")
    found = augmented(messages_of(row["conversations"], ["x.jpg"]), knowledge_of(row), Shown(mirrored=True))
    assert said(found) == [
        ("Where is it?\nA. front\nB. right\nAnswer with the letter of the right option.", "B. right")
    ]


@pytest.mark.parametrize("stage", ["vision", "finetune"])
def test_what_is_shown_how_follows_from_seed_epoch_and_index(stage, make):
    _, processor = make()
    source = DataSource("synthetic://?scenes=6&seed=3&width=128&questions=6&tables=1")
    samples = open_data([source], stage=stage, seed=0)[0]
    all_kinds = Augmentation(0.0 if stage == "vision" else 0.7, 0.5, 0.3)

    def batch(seed=1, epoch=0, augmentation=all_kinds, order=range(6)):
        collate = (
            VisionCollator(processor, seed, augmentation=augmentation)
            if stage == "vision"
            else ConversationCollator(processor, seed=seed, augmentation=augmentation)
        )
        return {n: collate([{**samples[n], "epoch": epoch}]) for n in order}

    first, again = batch(), batch(order=range(5, -1, -1))
    plain, later = batch(augmentation=Augmentation()), batch(epoch=1)
    differ = 0
    for n, inputs in first.items():
        for name, value in inputs.items():
            torch.testing.assert_close(value, again[n][name], rtol=0, atol=0)
        differ += not torch.equal(inputs["pixel_values"], plain[n]["pixel_values"])
    assert differ >= 2
    assert any(not torch.equal(first[n]["pixel_values"], later[n]["pixel_values"]) for n in first)


def test_shares_and_bounds():
    shown = [Augmentation(0.5, 0.25, 0.75, 6.0).draw(0, 0, index, 45) for index in range(2000)]
    assert np.mean([s.yaw_offset != 0 for s in shown]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([s.mirrored for s in shown]) == pytest.approx(0.25, abs=0.04)
    angles = np.array([math.hypot(*s.tilt) for s in shown])
    assert np.mean(angles > 0) == pytest.approx(0.75, abs=0.04) and angles.max() <= 6
    assert {s.yaw_offset for s in shown} == {45.0 * n for n in range(8)}


def test_rows_that_do_not_know_stay_as_they_are(make, panoramas, tmp_path):
    panoramas[0].save(tmp_path / "p.png")
    rows = [{"image": "p.png", "conversations": conversation()["conversations"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, processor = make()
    samples = open_data([DataSource(str(path))], stage="finetune", seed=0)[0]
    every = Augmentation(1.0, 1.0, 1.0)
    inputs = [
        ConversationCollator(processor, augmentation=augmentation)([samples[0]])
        for augmentation in (every, Augmentation())
    ]
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
    assert missing_knowledge(every, samples.opened[0].known) == ["no column 'turns': not turned, mirrored or tilted"]
    assert missing_knowledge(every, ("turns", "tilts")) == ["no column 'mirrors': not mirrored"]
    assert missing_knowledge(Augmentation(), ()) == []


def test_tilted_labels_are_not_known(make):
    _, processor = make()
    raw = open_data([DataSource("synthetic://?scenes=1&seed=3&width=128")], stage="vision", seed=0)[0][0]
    labelled = Labelled((8, 8), ("name",))
    tilted = VisionCollator(processor, 0, None, False, labelled, Augmentation(tilt=1.0))([raw])
    level = VisionCollator(processor, 0, None, False, labelled)([raw])
    assert bool((tilted["token_classes"] == -100).all()) and bool(tilted["token_places"].isnan().all())
    assert bool((level["token_classes"] != -100).any())


def test_the_trainer_says_at_the_start_what_stays_as_it_is(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("url,query,annotation\np.png,Where is it?,left\n")
    Image.new("RGB", (16, 8)).save(tmp_path / "p.png")
    options = ["--stage", "finetune", "--data", str(path), "--output", str(tmp_path / "out"), "--finetune.turn", "0.5"]
    with pytest.warns(UserWarning, match=r"rows.csv' has no column 'turns': not turned, mirrored or tilted"):
        check_run(load_config(["tiny.yaml", *options]), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("finetune.turn", "1.5", r"finetune.turn must be in \[0, 1\], got 1.5"),
        ("vision.turn", "0.5", "vision.turn must be 0: random_heading turns, got 0.5"),
        ("resampler.mirror", "-0.1", r"resampler.mirror must be in \[0, 1\]"),
        ("vision.tilt", "2", r"vision.tilt must be in \[0, 1\]"),
        ("vision.tilt_deg", "0", r"vision.tilt_deg must be in \(0, 45\]"),
    ],
)
def test_options_that_cannot_be(option, value, words):
    with pytest.raises(ValueError, match=words):
        load_config(["tiny.yaml", f"--{option}", value])


def test_the_options_decide_a_stage():
    config = TrainConfig()
    assert {"finetune.turn", "finetune.mirror", "finetune.tilt", "finetune.tilt_deg"} <= set(
        fingerprint(config, "finetune", 1)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mirrored": [True, False]}, "mirrored must name true or false a panorama, got 2 for 1"),
        ({"tilts": [(200.0, 0.0)]}, r"a tilt must be \(pitch, roll\) in \[-180, 180\] degrees"),
    ],
)
def test_calls_that_cannot_be(panoramas, options, words):
    with pytest.raises(ValueError, match=words):
        PanoramaImageProcessor(image_size=32)(panoramas[:1], **options)
