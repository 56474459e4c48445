"""Damaged and hostile input of every kind: what comes out is a result, or an error of the documented kinds that says
where it is from; nothing hangs, and nothing is kept."""

import contextlib
import json
import math
import signal
import struct
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from hypothesis import assume
from hypothesis import strategies as st
from jinja2 import TemplateError
from panorama_vlm import train as train_package
from panorama_vlm.data.collators import ConversationCollator
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.exports_panorama import (
    crop_place,
    draw_places,
    named,
    to_coco,
    to_geojson,
    to_pannellum,
    to_photo_sphere_viewer,
    whole_sphere,
)
from panorama_vlm.pipeline_panorama import PanoramaPipeline
from panorama_vlm.places_panorama import BFoV, NamedPlace
from panorama_vlm.reading_panorama import _FORMATS, Layout, layout_of, read_panorama
from panorama_vlm.tests.properties import few, holds
from panorama_vlm.tests.test_reading import crop_values, encoded, photo_sphere
from panorama_vlm.train.config import load_config
from PIL import Image

LIMIT_S = 10  # for one input of a few kilobytes
MAX_PIXELS = 2**22
MODES = ("RGB", "L", "RGBA", "P", "I;16", "F", "CMYK", "1")
GROWTH = 16 * 2**20  # bytes; the allocator's own coming and going


@contextlib.contextmanager
def limited(what):
    """Within the time, whatever C code does in it."""

    def late(*_):
        raise AssertionError(f"{what} took more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Images


def corpus(picture):
    """Small files of every format that Pillow writes here, in several of their kinds, and heads of those that other
    readers are for: name -> bytes."""
    small = picture.resize((48, 24))
    sphere = photo_sphere(**crop_values((96, 48), (48, 24), 10, 20), PosePitchDegrees=4, PoseRollDegrees=-3)
    kinds = {
        "JPEG": [{}, {"progressive": True}, {"xmp": sphere}, {"exif": Image.Exif()}],
        "PNG": [{}, {"optimize": True}],
        "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"}],
        "WEBP": [{}, {"lossless": True}, {"xmp": sphere}],
        "AVIF": [{}, {"xmp": sphere}],
    }
    files = {}
    for name in sorted(Image.SAVE):
        for number, options in enumerate(kinds.get(name, [{}])):
            for mode in MODES if name in _FORMATS else MODES[:1]:
                if options.get("compression") == "jpeg" and mode not in ("RGB", "L"):
                    continue  # libtiff's encoder refuses it, and has ended the process afterwards
                image = Image.fromarray(np.asarray(small.convert("L"), np.uint16) * 256) if mode == "I;16" else None
                with contextlib.suppress(OSError, ValueError, KeyError), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # not every format has every mode
                    files[f"{name}-{number}-{mode}"] = encoded(image or small.convert(mode), name, **options)
    pixels = bytes(np.asarray(small.convert("RGBA")))  # RGBE, in lines that are not packed
    files["HDR"] = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 24 +X 48\n" + pixels
    files["EXR"] = b"\x76\x2f\x31\x01\x02\0\0\0channels\0chlist\0" + struct.pack("<I", 37) + pixels
    files["HEIC"] = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + pixels
    for kind in (b"II*\0", b"MM\0*", b"II+\0"):
        files[f"TIFF {kind!r}"] = kind + pixels
    return files


def damaged(files, number):
    """The file of a case, and what is left of it: bits, bytes and numbers changed, parts taken out, doubled, moved, put
    in from another file, cut off."""
    rng = np.random.default_rng(number)
    names = sorted(files)
    name = names[number % len(names)]
    data = bytearray(files[name])
    for _ in range(rng.integers(1, 5)):
        size = len(data)
        place, length = int(rng.integers(size)), int(rng.integers(1, 1 + min(64, size)))
        match rng.integers(9):
            case 0:
                data[place] ^= 1 << rng.integers(8)
            case 1:
                for at in rng.integers(0, size, 8):
                    data[at] = rng.integers(256)
            case 2:  # sizes and offsets at their limits
                value = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000][rng.integers(6)]
                data[place : place + 4] = struct.pack("<>"[rng.integers(2)] + "I", value)
            case 3:
                data = data[: max(1, place)]
            case 4:
                del data[place : place + length]
            case 5:
                data[place:place] = data[place : place + length] * int(rng.integers(1, 4))
            case 6:
                other = files[names[rng.integers(len(names))]]
                data[place:place] = other[: rng.integers(1, len(other))]
            case 7:
                data[place : place + length] = bytes(length)
            case 8:  # most numbers that matter stand at the beginning
                data[int(rng.integers(min(size, 64)))] = rng.integers(256)
        data = data or bytearray(b"\0")
    return name, bytes(data)


def reads(source, name):
    """Whether it was read; else the error names it."""
    with limited(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            panorama = read_panorama(source, 64, max_pixels=MAX_PIXELS)
        except ValueError as error:
            assert name in str(error)
            return False
    height, width = panorama.pixels.shape[:2]
    assert panorama.pixels.ndim == 3 and 0 < height * width <= 4 * MAX_PIXELS
    assert panorama.pixels.dtype == torch.uint8 or panorama.pixels.isfinite().all()
    assert panorama.rotation is None or np.isfinite(panorama.rotation).all()
    return True


@few(500, 20_000)
def test_a_damaged_image_is_read_or_an_error_that_names_it(panoramas, tmp_path, examples, record_property):
    files = corpus(panoramas[0])
    assert len(files) > 60
    for data in files.values():
        reads(data, "image in bytes")
    process, path = psutil.Process(), tmp_path / "damaged"
    held, read, slowest, handles = [], 0, 0.0, process.num_fds()
    for number in range(examples):
        name, data = damaged(files, number)
        start = time.monotonic()
        if number % 4:
            read += reads(data, "image in bytes")
        else:
            path.write_bytes(data)
            read += reads(path, str(path))
        slowest = max(slowest, time.monotonic() - start)
        if number in (examples // 2, examples - 1):
            held.append(process.memory_info().rss)
    print(
        f"{len(files)} files, {examples} damaged: {read} read, the slowest in {slowest:.2f} s, "
        f"{(held[1] - held[0]) / 2**20:.1f} MiB in the second half"
    )
    assert 0.02 < read / examples < 0.98
    assert held[1] - held[0] < GROWTH and process.num_fds() <= handles
    record_property("soak", ("a damaged image is read, or an error that names it", examples, "nothing", slowest))


# Metadata

NUMBERS = ["0", "-1", "1", "32768", "96", "48", "2147483648", "9" * 400, "1e308", "1e999", "-1e999", "nan", "inf", "-0"]
NUMBERS += [
    "",
    " ",
    "0x10",
    "1,5",
    "4/0",
    "abc",
    "é",
    "٣",
    "90",
    "-90",
    "90.0001",
    "1e-320",
    "\x01",
    "&#0;",
    "&lt;",
    '"',
    "]]>",
]
ABSURD = st.sampled_from(NUMBERS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=8)
NAMES = st.sampled_from(
    ["FullPanoWidthPixels", "FullPanoHeightPixels", "CroppedAreaImageWidthPixels", "CroppedAreaImageHeightPixels"]
    + ["CroppedAreaLeftPixels", "CroppedAreaTopPixels", "PoseHeadingDegrees", "PosePitchDegrees", "PoseRollDegrees"]
    + ["ProjectionType", "InitialViewHeadingDegrees", "UsePanoramaViewer"]
)


@few(500, 20_000)
def test_absurd_photo_sphere_data_give_a_panorama_or_an_error_that_names_the_file(examples, record_property):
    picture = Image.new("RGB", (96, 48), "red")
    plausible = crop_values((96, 48), (48, 24), 10, 20)

    def check(case):
        changed, as_elements, kind = case
        xmp = photo_sphere(as_elements, **{**plausible, **changed})
        assert len(xmp) < 60_000  # of a JPEG
        source = encoded(picture, kind, xmp=xmp)
        with limited(str(changed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                panorama = read_panorama(source, 64, max_pixels=MAX_PIXELS, align_heading=True)
            except ValueError as error:
                assert "image in bytes" in str(error)
                return
        assert 0 < panorama.pixels.shape[0] * panorama.pixels.shape[1] <= MAX_PIXELS
        assert panorama.rotation is None or np.isfinite(panorama.rotation).all()
        assert panorama.covered is None or all(map(math.isfinite, panorama.covered))
        layout = layout_of(source, align_heading=True)
        json.dumps(vars(layout), allow_nan=False)

    kinds = st.sampled_from(["JPEG", "WEBP", "TIFF"] + ["AVIF"] * ("AVIF" in Image.SAVE))
    holds(
        check,
        st.tuples(st.dictionaries(NAMES, ABSURD, min_size=1, max_size=4), st.booleans(), kinds),
        examples,
        record_property,
    )


# Rows, options, conversations

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("<image>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system", 3]) | JSON,
        "value": JSON,
        "role": JSON,
        "content": JSON,
    },
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from(["a.jpg", "b.png", "../a.jpg", "missing.jpg", "", "\0", "http://localhost:1/a.jpg"])
        | JSON,
        "conversations": st.lists(TURN, max_size=4) | JSON,
        "query": st.text(max_size=8) | JSON,
        "annotation": st.text(max_size=8) | JSON,
        "id": JSON,
    },
)


@few(30, 1500)
def test_odd_rows_are_trained_on_or_skipped_with_their_reason(make, panoramas, tmp_path, examples, record_property):
    model, processor = make()
    collate = ConversationCollator(processor)
    panoramas[0].resize((64, 32)).save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(encoded(panoramas[0].resize((64, 32)))[:200])
    good = {"image": "a.jpg", "query": "Where?", "annotation": "Here."}
    number = 0

    def check(case):
        nonlocal number
        rows, noise = case
        number += 1
        path = tmp_path / f"{number}.jsonl"  # what is read is kept under the name
        lines = [*(json.dumps(row) for row in rows), *noise, json.dumps(good)]
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        with limited(lines), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                train, _ = open_data([DataSource(str(path))], stage="finetune", seed=0)
                samples = [train[index] for index in range(len(train))]
            except ValueError as error:
                assert path.name in str(error) or "annotation" in str(error) or "conversation" in str(error), error
                return
            skipped = []
            collate(samples, skipped)
        assert len(skipped) <= len(samples)
        assert all(each["reason"].strip() and each["source"] for each in skipped)

    noise = st.lists(st.text(max_size=20).filter(lambda text: text.strip()), max_size=2)
    holds(check, st.tuples(st.lists(ROW, min_size=1, max_size=4), noise), examples, record_property)


OPTIONS = ["compose", "options", "data", "vision", "resampler", "finetune", "num_workers", "save_every", "seed"]
OPTIONS += [
    "model",
    "output",
    "trackers",
    "validation_share",
    "vision.batch_size",
    "finetune.learning_rates.projection",
]
OPTIONS += ["nonsense"]
VALUES = ["", "-1", "nan", ".inf", "[", "{a: 1}", "!!python/object:os.system {}", "${oc.env:HOME}", "${x}"]


@few(30, 1000)
def test_odd_options_are_taken_or_refused_in_a_sentence(tmp_path, examples, record_property):
    tiny = (Path(train_package.__file__).parent / "configs/tiny.yaml").read_text()
    path = tmp_path / "odd.yaml"

    def check(case):
        place, cut, typed, (name, value) = case
        text = tiny[:place] + typed + tiny[place + cut :]
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        for arguments in ([str(path)], ["tiny.yaml", f"--{name}", value]):
            with limited(arguments):
                try:
                    load_config(arguments)
                except ValueError as error:
                    assert str(error).strip()

    typed = st.text(max_size=6) | st.sampled_from(["\t", "- ", ": ", "&a [*a]", "!!python/name:os.system", "${", "\0"])
    option = st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES))
    holds(check, st.tuples(st.integers(0, len(tiny)), st.integers(0, 40), typed, option), examples, record_property)


PART = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image", "image_url", "video", None]) | JSON,
        "text": st.text(max_size=8) | JSON,
        "image": st.sampled_from(["missing.jpg", "data:image/png;base64,AAAA", "data:x", b"x", 3, ""]) | JSON,
        "image_url": JSON,
        "further_views": JSON,
        "tilt": JSON,
    },
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
        "content": st.text(max_size=8) | st.lists(PART | JSON, max_size=3) | JSON,
        "tool_calls": JSON,
        "reasoning_content": JSON,
    },
)


@few(150, 3000)
def test_odd_messages_are_rendered_or_refused(make, examples, record_property):
    _, processor = make()

    def check(messages):
        for options in (
            {"tokenize": True, "return_dict": True, "add_generation_prompt": True},
            {"return_labels": True},
        ):
            with limited(messages), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    processor.apply_chat_template(messages, **options)
                except (ValueError, TypeError, OSError, TemplateError) as error:
                    assert str(error).strip()

    holds(check, st.lists(MESSAGE | JSON, max_size=3), examples, record_property)


# Places in the forms of others

NUMBERS_OF_A_PLACE = st.tuples(st.floats(-720, 720), st.floats(-90, 90), st.floats(1, 360), st.floats(1, 180))
PLACES = st.lists(
    st.builds(NamedPlace, st.text(max_size=9), st.builds(lambda each: BFoV(*each), NUMBERS_OF_A_PLACE), st.none()),
    max_size=3,
)
WRONG = [
    None,
    "x",
    "",
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    10**400,
    -(10**400),
    True,
    [],
    {},
    (1,),
    "1",
    b"\0",
    -1e-9,
]
LAYOUTS = [
    Layout(64, 32, (32, 64), position=(1.0, 2.0), heading=3.0),
    Layout(32, 16, (32, 64), 4, 10, heading=20.0, position=(-90.0, 180.0)),
    Layout(64, 32, (32, 64), pitch=3.0, roll=-2.0, heading=1.0, position=(89.9, 179.99)),
]


@few(200, 20_000)
def test_places_are_exported_or_the_value_that_is_wrong_is_named(examples, record_property):
    """One thing is absurd in half of the cases, wherever it stands; NaN reached the JSON of every form."""
    picture = Image.new("RGB", (64, 32), "red")
    forms = {
        "pannellum": lambda places, layout, _: to_pannellum(places, layout),
        "photo_sphere_viewer": lambda places, layout, _: to_photo_sphere_viewer(places, layout),
        "geojson": lambda places, layout, options: to_geojson(places, layout, **options),
        "coco": lambda places, layout, _: to_coco([("file", replace(layout, pitch=0.0, roll=0.0), places)]),
        "drawing": lambda places, *_: draw_places(picture, places),
        "crops": lambda places, _, options: [
            crop_place(picture, each.place, **{"size": 8, **options}) for each in named(places)
        ],
        "sphere": lambda _, __, options: whole_sphere(picture, **{"width": 8, **options}),
    }
    takes = {"geojson": ["position", "heading", "reach"], "crops": ["size", "margin"], "sphere": ["width"]}

    def check(case):
        places, layout, form, spoils, where, wrong = case
        options, names = {}, []
        if spoils and form in takes and where % 2:
            name = takes[form][where % len(takes[form])]
            options, names = {name: wrong}, [name]
        elif spoils and places:
            each = places[where % len(places)]
            parts = [each.place._replace(**{part: wrong}) for part in BFoV._fields]
            bad = [*(each._replace(place=place) for place in parts), each._replace(label=wrong), wrong][where % 6]
            places, names = [*places[:-1], bad], ["a place must be", "pitch must be in", "label of a place"]
        with limited(case), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = forms[form](places, layout, options)
            except ValueError as error:
                assert any(name in str(error) for name in names), error
                return
        if isinstance(made, dict):
            json.dumps(made, allow_nan=False)

    case = st.tuples(PLACES, st.sampled_from(LAYOUTS), st.sampled_from(sorted(forms)), st.booleans())
    cases = st.tuples(case, st.integers(0, 60), st.sampled_from(WRONG)).map(lambda each: (*each[0], *each[1:]))
    holds(check, cases, examples, record_property)


# The pipeline


@few(60, 1000)
def test_the_pipeline_answers_or_names_the_value_that_is_wrong(make, panoramas, examples, record_property):
    """One absurd argument at a time: "12" were two directions, 1.5 was to look twice, NaN tokens had no end."""
    model, processor = make()
    asked, picture = PanoramaPipeline(model, processor=processor), panoramas[0].resize((64, 32))
    place = NamedPlace("a", BFoV(1.0, 2.0, 3.0, 4.0))
    verbs = {
        "question": lambda value: asked(picture, value, max_new_tokens=1),
        "look_twice": lambda value: asked(picture, "x", look_twice=value, max_new_tokens=1),
        "look_twice ": lambda value: list(asked.ask(picture, "x", look_twice=value, stream=True, max_new_tokens=1)),
        "headings": lambda value: asked(picture, "x", headings=value, turn_words=False, max_new_tokens=1),
        "turn_words": lambda value: asked(picture, "x", headings=2, turn_words=value, max_new_tokens=1),
        "turn_words ": lambda value: asked(picture, "x", turn_words=value, max_new_tokens=1),
        "what": lambda value: asked.point(picture, value, max_new_tokens=1),
        "what ": lambda value: asked.detect(picture, value, max_new_tokens=1),
        "direction": lambda value: asked.describe(picture, value, max_new_tokens=1),
        "prompt": lambda value: asked.describe(picture, 1, prompt=value, max_new_tokens=1),
        "prompts": lambda value: PanoramaPipeline(model, processor=processor, prompts=value),
        "prompts ": lambda value: PanoramaPipeline(model, processor=processor, prompts={"point": value}),
        "max_new_tokens": lambda value: asked(picture, "x", max_new_tokens=value),
        "temperature": lambda value: asked(picture, "x", max_new_tokens=1, temperature=value),
        "name": lambda value: asked.export(picture, [place], "pannellum", value),
        "places can be exported to": lambda value: asked.export(picture, [place], value),
    }
    absurd = st.sampled_from(
        [*WRONG, "12", 1.5, -1, 0, 10**30, [None], [math.nan], ["a", 3], {"point": 3}, "{}", "{x}"]
    )

    def check(case):
        name, value = case
        is_many = isinstance(value, int | float) and 100 < value < math.inf
        assume(name != "max_new_tokens" or not is_many)  # it would say so many
        try:
            with limited(case), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verbs[name](value)
        except ValueError as error:
            assert name.strip() in str(error), f"{case}: {error}"

    holds(check, st.tuples(st.sampled_from(sorted(verbs)), absurd | ABSURD | JSON), examples, record_property)
