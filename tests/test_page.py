"""The page, in a browser as visitors have it: `make test-tools` installs Gradio and Playwright, Chromium is the
system's."""

import io
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.tools
gr = pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: apt install chromium", allow_module_level=True)

from panorama_vlm import PanoramaProcessor, PanoramaVLM  # noqa: E402
from panorama_vlm.demo import page as pages  # noqa: E402
from panorama_vlm.pictures import saliency  # noqa: E402
from panorama_vlm.pipeline_panorama import PanoramaPipeline  # noqa: E402
from panorama_vlm.places_panorama import great_circle  # noqa: E402
from panorama_vlm.synthetic.write import World  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 512  # pixels of the scenes
RIGHT = 10  # scenes whose thing the model finds
MOST_SCENES = 80  # among which these are looked for
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
# WebGL without a graphics card.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
BOT = "#chat .bot.message:not(:has(.dots))"  # an answer
WHERE = "Where exactly is the {}? Answer with [yaw, pitch, x_fov, y_fov] in degrees."
EACH = "() => document.querySelector('.panorama').parentElement.viewer"


@pytest.fixture(scope="module")
def pipeline():
    if not (ROOT / "model.safetensors").is_file():
        pytest.skip("there is no model at the root of the repository")
    model = PanoramaVLM.from_checkpoint(ROOT, dtype=torch.float32).eval()
    return PanoramaPipeline(model, processor=PanoramaProcessor.from_pretrained(ROOT))


def pixel_of(yaw, pitch, height, width):
    """Row and column of a direction in an equirectangular image."""
    column = math.floor((yaw / 360 + 0.5) % 1 * width)
    return min(height - 1, math.floor((0.5 - pitch / 180) * height)), min(width - 1, column)


@pytest.fixture(scope="module")
def scenes(pipeline, tmp_path_factory):
    """A folder of samples of which the model finds a thing; of each its name, the question, where the thing is seen
    [H, W], and the picture."""
    folder, found = tmp_path_factory.mktemp("samples"), []
    world = World(4242, WIDTH, questions=1, kinds=("grounding",))
    rows = []
    for number in range(MOST_SCENES):
        scene = world.scene(number)
        (question,) = world.ask(scene)
        picture, labels = world.labelled_picture(scene)
        thing = next(i for i, each in enumerate(scene.things) if each.place == question.places[0])
        places = pipeline(picture, question.words)["places"]
        if places and labels.things[pixel_of(*places[0].place[:2], WIDTH // 2, WIDTH)] == thing:
            name = f"scene-{number}.jpg"
            picture.save(folder / name, quality=95)
            turns = [{"from": "human", "value": question.words}, {"from": "gpt", "value": question.answer}]
            rows.append({"file_name": name, "conversations": turns, "questions": [question.words]})
            found.append((name.removesuffix(".jpg"), question.words, labels.things == thing, picture))
        if len(found) == RIGHT:
            break
    assert len(found) == RIGHT, f"the model finds only {len(found)} of {MOST_SCENES} things"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder, found


def serve(page):
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, max_file_size="2mb", **pages.LOOK)
    return url


@pytest.fixture(scope="module")
def url(pipeline, scenes, tmp_path_factory):
    """Address of the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = pages.Page(pipeline, pages.read_samples(scenes[0]), about="A page under test.").build()
        yield serve(page)
        page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page as a visitor of one's own; what the browser complains about or fetches elsewhere is a failure."""
    contexts, complaints = [], []

    def visit(address=url, **options):
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: complaints.append(request.url) if is_elsewhere(request.url) else None)
        page.streams = set()
        page.on("request", lambda request: page.streams.add(request) if "queue/data" in request.url else None)
        for ended in ("requestfinished", "requestfailed"):
            page.on(ended, lambda request: page.streams.discard(request))
        page.goto(address)
        page.wait_for_selector(".panorama[data-shown]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints


def is_elsewhere(address):
    return not address.startswith(("http://127.0.0.1:", "data:", "blob:"))


def answers(page):
    """What the model has said, the newest last; three dots stand for what is to come."""
    return page.locator("#chat .bot.message:not(:has(.dots))").all_inner_texts()


def finished(page, count):
    """Wait until there are `count` answers and none goes on; the newest."""
    page.wait_for_function(
        "count => { const bots = [...document.querySelectorAll('#chat .bot.message:not(:has(.dots))')];"
        " return bots.length >= count && bots.at(-1).innerText.trim() && document.querySelector('#stop').disabled }",
        arg=count,
    )
    while page.streams:  # until then Gradio takes no further question
        page.wait_for_timeout(50)
    return answers(page)[-1].strip()


def ask(page, words):
    """Ask by typing; the answer."""
    count = len(answers(page))
    page.locator("#question textarea").fill(words)
    page.locator("#question textarea").press("Enter")
    return finished(page, count + 1)


def pick(page, name):
    page.locator(".samples button", has_text=re.compile(f"^{name}$")).click()
    page.wait_for_selector(f'.panorama[data-shown="{name}"]')


def upload(page, name, data):
    page.locator("#upload input[type=file]").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": data})


def look(page, yaw, pitch):
    page.evaluate(f"([yaw, pitch]) => ({EACH})().lookAt(pitch, yaw, 100, false)", [yaw, pitch])
    page.wait_for_timeout(200)


def looks(page):
    return page.evaluate(f"() => [({EACH})().getYaw(), ({EACH})().getPitch()]")


def colour_in_the_middle(page):
    """Of the viewer, as it is on the screen."""
    picture = Image.open(io.BytesIO(page.locator(".panorama").screenshot())).convert("RGB")
    return np.array(picture.getpixel((picture.width // 2, picture.height // 2)))


def encoded(picture, format="PNG"):
    held = io.BytesIO()
    picture.save(held, format)
    return held.getvalue()


@pytest.fixture(scope="module")
def patches():
    """A grey panorama [256, 512, 3] with a red patch around yaw 60, pitch 20 and a blue one around -120, -40."""
    pixels = np.full((256, 512, 3), 128, np.uint8)
    for colour, yaw, pitch in (((220, 20, 20), 60, 20), ((20, 20, 220), -120, -40)):
        row, column = pixel_of(yaw, pitch, 256, 512)
        pixels[row - 14 : row + 14, column - 14 : column + 14] = colour
    return Image.fromarray(pixels)


@pytest.mark.slow
def test_the_repository_is_a_space(tmp_path):
    """`app.py` finds the package in its own folder, whatever that is called, where none is installed."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "*.safetensors")
    shutil.copytree(ROOT, tmp_path / "app", ignore=ignored)
    code = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
made = runpy.run_path("app.py")
assert "make_page" in made
print(sys.modules["panorama_vlm"].__file__)"""
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path / "app", env={"PATH": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == str(tmp_path / "app" / "__init__.py")


# Looking


def test_an_upload_is_shown_where_it_lies_on_the_sphere(visit, patches):
    page = visit()
    upload(page, "garden.png", encoded(patches))
    page.wait_for_selector('.panorama[data-shown="garden.png"]')
    for yaw, pitch, colour in ((60, 20, (220, 20, 20)), (-120, -40, (20, 20, 220)), (-60, 20, (128, 128, 128))):
        look(page, yaw, pitch)
        assert np.abs(colour_in_the_middle(page) - colour).max() < 25
    assert page.locator(".note").inner_text() == "garden.png"
    page.get_by_text("What the model sees").click()
    assert page.locator(".views img").evaluate("image => image.naturalWidth") >= 1000


def test_one_looks_around_by_mouse_and_keys_without_asking_anything(visit):
    page = visit()
    look(page, 0, 0)
    box = page.locator(".panorama").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 150, y, steps=8)
    page.wait_for_timeout(300)
    page.mouse.up()
    page.wait_for_timeout(500)
    yaw, pitch = looks(page)
    assert 10 < yaw < 60 and abs(pitch) < 3  # the picture goes to the left, so one looks to the right
    page.locator(".panorama").focus()
    page.keyboard.down("ArrowUp")
    page.wait_for_function(f"pitch => ({EACH})().getPitch() > pitch + 3", arg=pitch)
    page.keyboard.up("ArrowUp")
    assert answers(page) == []


def test_what_is_missing_of_a_partial_panorama_is_striped_and_said(visit, patches):
    alpha = np.full((256, 512), 255, np.uint8)
    alpha[:, :128] = 0  # yaw -180 to -90
    picture = patches.copy()
    picture.putalpha(Image.fromarray(alpha))
    page = visit()
    upload(page, "part.png", encoded(picture))
    page.wait_for_selector('.panorama[data-shown="part.png"]')
    assert "75% of the sphere" in page.locator(".note").inner_text()
    look(page, -135, 0)
    assert colour_in_the_middle(page).max() < 90
    look(page, 60, 20)
    assert np.abs(colour_in_the_middle(page) - (220, 20, 20)).max() < 25


@pytest.mark.slow
def test_what_is_no_panorama_gets_a_sentence_and_the_page_goes_on(visit, patches, scenes):
    whole = encoded(patches, "JPEG")
    page = visit()
    before = page.locator(".panorama").get_attribute("data-shown")
    for name, data in (
        ("noise.jpg", np.random.default_rng(0).bytes(5000)),
        ("cut.jpg", whole[: len(whole) // 3]),
        ("words.png", b"these are words"),
        ("empty.jpg", b""),
        ("<img src=x onerror=alert(1)>.jpg", b"GIF89a" + bytes(40)),
    ):
        upload(page, name, data)
        page.wait_for_function("() => document.querySelector('.note .wrong')")
        said = page.locator(".note").inner_text()
        assert "cannot read" in said and said.count("\n") == 0 and len(said) < 300
        assert not re.search(r"Traceback|/tmp|/home|gradio|" + re.escape(str(ROOT)), said)
        assert page.locator(".note img").count() == 0
        assert page.locator(".panorama").get_attribute("data-shown") == before
        pick(page, scenes[1][1][0])  # the sentence goes
        page.wait_for_function("() => !document.querySelector('.note .wrong')")
        pick(page, before)
    upload(page, "large.jpg", whole + bytes(3 * 2**20))
    page.get_by_text(re.compile("File size exceeds|too large|maximum", re.I)).first.wait_for()
    assert len(ask(page, "What was put in front of you?")) > 0


def test_what_is_guessed_of_a_file_is_said(visit, patches):
    page = visit()
    upload(page, "wide.png", encoded(patches.crop((0, 64, 512, 192))))
    page.wait_for_selector('.panorama[data-shown="wide.png"]')
    said = page.locator(".note").inner_text()
    assert "71% of the sphere" in said  # sin(45 degrees)
    assert "wide.png is 512 x 128 pixels, not 2:1" in said and "/" not in said


# Asking


@pytest.mark.slow
def test_answers_stream_follow_each_other_and_are_asked_again(visit, pipeline, scenes):
    page = visit()
    name, words, _, picture = scenes[1][0]
    page.evaluate(
        """() => { window.lengths = [];
        const note = () => { const bots = document.querySelectorAll('#chat .bot.message:not(:has(.dots))');
          if (bots.length) window.lengths.push(bots[bots.length - 1].innerText.trim().length); };
        new MutationObserver(note).observe(document.querySelector('#chat'),
          {subtree: true, childList: true, characterData: true}); }"""
    )
    first = ask(page, words)
    file = scenes[0] / f"{name}.jpg"
    assert first == pipeline.ask(str(file), words)
    assert len({length for length in page.evaluate("window.lengths") if 0 < length <= len(first)}) >= 3
    second = ask(page, "How many cubes can you see?")
    turns = [("user", words), ("assistant", first), ("user", "How many cubes can you see?")]
    chat = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns]
    chat[0]["content"].insert(0, {"type": "image", "image": str(file)})
    assert second == pipeline.ask(chat)
    page.get_by_role("button", name=re.compile("retry", re.I)).last.click()
    page.wait_for_timeout(1000)
    assert len(finished(page, 2)) > 0 and len(answers(page)) == 2
    page.get_by_role("button", name=re.compile("clear", re.I)).click()
    page.wait_for_function("() => !document.querySelector('#chat .bot.message:not(:has(.dots))')")
    assert page.locator(".spot").count() == 0
    page.locator("#question textarea").press("Enter")  # nothing to ask, nothing asked
    page.wait_for_timeout(1000)
    while page.streams:
        page.wait_for_timeout(50)
    assert answers(page) == []
    assert ask(page, words) == first  # and nothing is left of the chat before


@pytest.mark.slow
def test_the_page_shows_where_an_answer_looked_and_forgets_it_with_the_answer(visit, pipeline, scenes):
    page = visit()
    button, picture = page.locator("#look"), page.locator("#looked img")
    name, words, seen, _ = scenes[1][0]
    assert button.is_disabled() and picture.count() == 0
    said = ask(page, words)
    button.click()
    picture.wait_for()
    heat = saliency(pipeline, {"panorama": str(scenes[0] / f"{name}.jpg"), "question": words}, said).heat
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    yaw, pitch = round((column + 0.5) / 512 * 360 - 180), round(90 - (row + 0.5) / 256 * 180)
    assert f"most at yaw {yaw}°, pitch {pitch}°" in page.locator("#looked").inner_text()
    places = np.argwhere(seen)
    assert np.abs(places - pixel_of(yaw, pitch, *seen.shape)).max(1).min() < 40  # pixels of 512: beside the thing
    while page.streams:
        page.wait_for_timeout(50)
    ask(page, "How many cubes can you see?")
    assert picture.count() == 0 and button.is_enabled()
    pick(page, scenes[1][1][0])
    page.wait_for_function("() => document.querySelector('#look').disabled")


@pytest.mark.slow
def test_stop_and_leaving_end_an_answer_and_the_next_one_is_given(visit, pipeline, scenes):
    endless = PanoramaPipeline(pipeline.model, processor=pipeline.processor, min_new_tokens=3000)
    endless_page = pages.Page(endless, pages.read_samples(scenes[0]), max_new_tokens=3000).build()
    page = visit(serve(endless_page))
    for count in (1, 2):
        page.locator("#question textarea").fill("What was put in front of you?")
        page.locator("#question textarea").press("Enter")
        page.wait_for_function(
            "count => { const bots = document.querySelectorAll('#chat .bot.message:not(:has(.dots))');"
            " return bots.length == count && bots[count - 1].innerText.length > 40 }",
            arg=count,
        )
        began = time.monotonic()
        page.locator("#stop").click()
        assert finished(page, count).endswith("(stopped)")
        assert time.monotonic() - began < 10
    page.locator("#question textarea").fill("What was put in front of you?")
    page.locator("#question textarea").press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#chat .bot.message:not(:has(.dots))').length == 3")
    name = scenes[1][1][0]
    pick(page, name)  # an answer about another panorama is of no use any more
    page.wait_for_timeout(1500)
    assert answers(page) == [] and page.locator("#stop").is_disabled()
    page.locator("#question textarea").fill("What was put in front of you?")
    page.locator("#question textarea").press("Enter")
    page.wait_for_function(f"() => document.querySelector('{BOT}')?.innerText.length > 40")
    address = page.url
    page.context.close()  # who leaves is no longer answered
    page = visit(address)
    page.locator("#question textarea").fill("What was put in front of you?")
    page.locator("#question textarea").press("Enter")
    page.wait_for_function("() => document.querySelector('#chat .bot.message:not(:has(.dots))')?.innerText.length > 40")
    page.locator("#stop").click()
    finished(page, 1)
    endless_page.close()


# Places


@pytest.mark.slow
def test_hotspots_lie_on_the_things_that_were_asked_for(visit, scenes):
    page = visit()
    for name, words, thing, _ in scenes[1]:
        pick(page, name)
        ask(page, words)
        page.wait_for_selector(".spot")
        page.wait_for_timeout(300)  # the viewer turns to the place
        box = page.locator(".spot button").first.bounding_box()
        middle = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
        pitch, yaw = page.evaluate(f"([x, y]) => ({EACH})().mouseEventToCoords({{clientX: x, clientY: y}})", middle)
        assert thing[pixel_of(yaw, pitch, *thing.shape)], name
        number = page.locator(".places button").inner_text()
        assert number.startswith("1: look at") and str(round(yaw)) in number


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mouse", "touch", "keys", "button"])
def test_a_click_asks_about_the_direction_that_is_there(how, visit, scenes, pipeline):
    page = visit(**PHONE) if how == "touch" else visit()
    name = scenes[1][0][0]
    look(page, 40, -20)
    box = page.locator(".panorama").bounding_box()
    right, down = (0.2, 0.15) if how in ("mouse", "touch") else (0.0, 0.0)  # of its width, from the middle
    x, y = box["x"] + box["width"] * (0.5 + right), box["y"] + box["height"] / 2 + box["width"] * down
    if how == "mouse":
        page.mouse.click(x, y)
    elif how == "touch":
        page.touchscreen.tap(x, y)
    elif how == "keys":
        page.locator(".panorama").focus()
        page.keyboard.press("Enter")
    else:
        page.get_by_role("button", name="Ask what is in the middle").click()
    said = finished(page, 1)
    words = page.locator("#chat .user.message").inner_text().strip()
    yaw, pitch, *size = map(int, re.search(r"\[(.*)\]", words)[1].split(","))
    # The ray of a pixel of a pinhole camera, in its coordinates and then turned up and right.
    wide = 2 * math.tan(math.radians(100) / 2)
    ray = np.array([right * wide, -down * wide, 1.0])
    a, b = math.radians(40), math.radians(-20)
    up = np.array([[1, 0, 0], [0, math.cos(b), math.sin(b)], [0, -math.sin(b), math.cos(b)]])
    turn = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    ray = turn @ up @ ray / np.linalg.norm(ray)
    expected = math.degrees(math.atan2(ray[0], ray[2])), math.degrees(math.asin(ray[1]))
    assert great_circle(expected, (yaw, pitch)) < 1.5 and size == [16, 16]
    assert said == pipeline.ask(str(scenes[0] / f"{name}.jpg"), words)


# Everybody


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_the_screen(options, visit, scenes):
    page = visit(**options)
    for asked in (False, True):
        if asked:
            ask(page, scenes[1][0][1])
            page.locator("#look").click()
            page.locator("#looked img").wait_for()
            page.get_by_text("What the model sees").click()
            page.wait_for_timeout(500)
        found = axe.Axe().run(page).response["violations"]
        assert [(each["id"], each["help"]) for each in found if each["impact"] in ("serious", "critical")] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_five_visitors_at_once_get_the_answers_about_their_own_panoramas(visit, pipeline, scenes):
    folder, found = scenes
    visitors = [visit() for _ in range(5)]
    for page, (name, *_) in zip(visitors, found, strict=False):
        pick(page, name)
    process, sizes = psutil.Process(), []
    for count in range(1, 11):
        for page in visitors:  # all wait at once
            page.locator("#question textarea").fill(WHERE.format("red cube") if count % 2 else found[0][1])
            page.locator("#question textarea").press("Enter")
        said = [finished(page, count) for page in visitors]
        if count == 1:
            files = [str(folder / f"{name}.jpg") for name, *_ in islice(found, 5)]
            assert said == pipeline.ask(files, WHERE.format("red cube"))
        sizes.append(process.memory_info().rss / 2**20)
        assert not any(page.get_by_text(re.compile("^Error")).count() for page in visitors)
    assert sizes[-1] - sizes[3] < 60, sizes  # MiB, over the last 30 questions


@pytest.mark.slow
def test_the_command_serves_this_machine_alone_and_refuses_what_is_large(pipeline, scenes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "panorama_vlm.demo", "--samples", str(scenes[0]), "--max-upload", "1"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                text = urllib.request.urlopen(address, timeout=5).read().decode()
                break
            except urllib.error.URLError:
                assert server.poll() is None, server.stdout.read().decode()
                time.sleep(1)
        assert "PanoramaVLM" in text
        listens = {each.laddr.ip for each in psutil.Process(server.pid).net_connections() if each.status == "LISTEN"}
        assert listens == {"127.0.0.1"}
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        body += bytes(2 * 2**20) + b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 413
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize(
    "line",
    ["[]", "3", "{", "{}", '{"file_name": 3}', '{"file_name": "a.jpg", "query": 3}', '{"file_name": "../a.jpg"}']
    + ['{"file_name": "/etc/passwd"}', '{"file_name": "a.jpg", "conversations": [3]}'],
)
def test_a_line_of_the_samples_that_is_none_is_named(line, tmp_path):
    """And no file beside the folder is shown to visitors."""
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.jpg", "query": null}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2 of .*metadata.jsonl' is no JSON object with file_name and query"):
        pages.read_samples(tmp_path)
