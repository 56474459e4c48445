"""`transformers serve` serves a trained folder as it is; asked over HTTP by the `openai` client."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from panorama_vlm import PanoramaProcessor, PanoramaVLM
from panorama_vlm.tests.launching import run_here
from PIL import Image

openai = pytest.importorskip("openai")
for _name in ("fastapi", "uvicorn"):
    pytest.importorskip(_name)

pytestmark = pytest.mark.tools
SAMPLES = Path(__file__).resolve().parent.parent / "samples"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
SERVE = [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve"]

# Everything that loads a folder, each alone, with or without trust.
LOAD = """
import json, sys
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, trust = sys.argv[1], sys.argv[2] == "trust"
loaders = [auto.from_pretrained for auto in (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText)]
loaders += [AutoProcessor.from_pretrained, lambda folder, **trusted: pipeline("image-text-to-text", folder, **trusted)]
outcomes = []
for load in loaders:
    try:
        load(folder, **({"trust_remote_code": True} if trust else {}))
        outcomes.append("loaded")
    except ValueError as error:
        outcomes.append("refused" if "trust_remote_code" in str(error) else repr(error))
print()
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained folder, whose weights are drawn anew so that its answers depend on what is asked, and are ASCII."""
    output = tmp_path_factory.mktemp("serving")
    run_here(
        output, *(option for stage in ("vision", "resampler", "finetune") for option in (f"--{stage}.max_steps", 1))
    )
    folder = output / "finetune"
    model, processor = PanoramaVLM.from_pretrained(folder), PanoramaProcessor.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
        embeddings = model.get_input_embeddings().weight
        embeddings *= 0.05  # the head's, too: else each token asks for itself
        for token in range(len(embeddings)):
            if not (text := processor.tokenizer.decode([token])).isascii() or not text.isprintable() or len(text) != 1:
                embeddings[token] = 0
    model.save_pretrained(folder)
    return folder


def state_of(folder):
    """What lies in a folder: name, time and content of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """`transformers serve --trust-remote-code FOLDER`, without the package: `(address, state of the folder before)`."""
    place = tmp_path_factory.mktemp("server")
    before = state_of(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [*SERVE, "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port), str(folder)],
            stdout=log,
            stderr=log,
            cwd=place,
            env={**ENVIRONMENT, "HF_HOME": str(place / "home")},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (place / "log").read_text()[-3000:]
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except URLError:
                time.sleep(0.2)
        yield address, before
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def chat(server, folder):
    """`chat(messages, **options)` -> the answer to messages as the client knows them; each of its own connection."""

    def ask(messages, **options):
        with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=100, max_retries=0) as client:
            answer = client.chat.completions.create(
                model=str(folder), messages=messages, **{"max_tokens": 12, **options}
            )
            return [chunk.choices[0] for chunk in answer] if options.get("stream") else answer

    return ask


@pytest.fixture(scope="module")
def local(folder):
    """`local(messages)` -> the answer of the same folder in this process, without a server."""
    model, processor = PanoramaVLM.from_pretrained(folder), PanoramaProcessor.from_pretrained(folder)

    def ask(messages):
        own = [
            {"role": message["role"], "content": [as_transformers(part) for part in parts(message)]}
            for message in messages
        ]
        inputs = processor.apply_chat_template(
            own, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        sequences = model.generate(**inputs, max_new_tokens=12)
        length = inputs["input_ids"].shape[1]
        return processor.decode(sequences[0, length:], skip_special_tokens=True), length

    return ask


def parts(message):
    content = message["content"]
    return [text(content)] if isinstance(content, str) else content


def as_transformers(part):
    if part["type"] == "text":
        return part
    return {"type": "image", "image": base64.b64decode(part["image_url"]["url"].partition(",")[2])}


def text(words):
    return {"type": "text", "text": words}


def image(data):
    """A part with the bytes of an image as a data URL; of a sample by its name."""
    if isinstance(data, str):
        data = (SAMPLES / data).read_bytes()
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(data).decode()}}


def user(*content):
    return {"role": "user", "content": list(content)}


QUESTION = [user(image("park.jpg"), text("sun"))]
CONVERSATIONS = {
    "one panorama": QUESTION,
    "another panorama": [user(image("bridge.jpg"), text("sun"))],
    "two panoramas": [user(image("park.jpg"), image("bridge.jpg"), text("Which is brighter?"))],
    "words between panoramas": [user(text("this"), image("bridge.jpg"), text("or this?"), image("park.jpg"))],
    "turns": [*QUESTION, {"role": "assistant", "content": "to the left"}, user(text("and the tree?"))],
    "a panorama in the second turn": [
        {"role": "system", "content": "Answer with one word."},
        user(text("hello")),
        {"role": "assistant", "content": "hello"},
        user(image("park.jpg"), text("sun")),
    ],
    "no panorama": [{"role": "user", "content": "hello"}],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_it_answers_as_the_model_does(chat, local, name, stream):
    words, length = local(CONVERSATIONS[name])
    assert len(set(words)) > 3
    answer = chat(CONVERSATIONS[name], stream=stream)
    if stream:
        assert "".join(choice.delta.content or "" for choice in answer) == words
        assert [choice.finish_reason for choice in answer if choice.finish_reason] == ["length"]
    else:
        assert answer.choices[0].message.content == words
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 12)


def test_every_conversation_has_another_answer(local):
    answers = [local(messages)[0] for messages in CONVERSATIONS.values()]
    assert len(set(answers)) == len(answers)


def test_three_at_once_get_their_own_answers(chat, local):
    names = ["one panorama", "another panorama", "two panoramas"] * 2
    with ThreadPoolExecutor(3) as at_once:
        answers = list(at_once.map(lambda name: chat(CONVERSATIONS[name]), names))
    assert [answer.choices[0].message.content for answer in answers] == [
        local(CONVERSATIONS[name])[0] for name in names
    ]


def test_a_string_that_stops_stops(chat, local):
    words, _ = local(QUESTION)
    stop = words[4:6]
    answer = chat(QUESTION, stop=[stop])
    assert answer.choices[0].message.content == words[: words.index(stop) + 2]
    assert answer.choices[0].finish_reason == "stop"


def bomb():
    """A PNG of a few hundred kilobytes that says that it is 40,000 x 20,000 pixels."""
    data = io.BytesIO()
    Image.new("1", (40_000, 20_000)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: b"no image at all", id="no image"),
        pytest.param(lambda: (SAMPLES / "park.jpg").read_bytes()[:2000], id="cut off"),
        pytest.param(lambda: bytes(48 << 20), id="64 MiB"),
        pytest.param(bomb, id="bomb"),
    ],
)
def test_what_cannot_be_read_is_an_error_and_the_next_is_answered(chat, local, data, stream):
    with pytest.raises(openai.APIStatusError) as error:
        chat([user(image(data()), text("sun"))], stream=stream)
    assert error.value.status_code >= 400
    assert chat(QUESTION).choices[0].message.content == local(QUESTION)[0]


def test_a_client_that_goes_away_stops_its_answer(server, folder, chat, local):
    began = time.monotonic()
    chat(QUESTION, max_tokens=100)
    hundred = time.monotonic() - began
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=100, max_retries=0) as client:
        stream = client.chat.completions.create(model=str(folder), messages=QUESTION, max_tokens=20_000, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
    began = time.monotonic()
    assert chat(QUESTION).choices[0].message.content == local(QUESTION)[0]
    assert time.monotonic() - began < 20 * hundred + 5  # 20,000 tokens take 200 times as long, or longer


def load(folder, trust, home):
    arguments = [sys.executable, "-P", "-c", LOAD, str(folder), "trust" if trust else "no"]
    environment = {**ENVIRONMENT, "HF_HOME": str(home)}
    run = subprocess.run(
        arguments, capture_output=True, text=True, cwd=home.parent, env=environment, stdin=subprocess.DEVNULL
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_loading_asking_and_serving_write_nothing_into_the_folder(server, folder, chat, tmp_path):
    assert load(folder, True, tmp_path / "home") == ["loaded"] * 6
    chat(QUESTION)
    assert state_of(folder) == server[1]


@pytest.mark.slow
def test_without_trust_none_of_its_code_runs(folder, tmp_path):
    marked, canary = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder, marked)
    for file in marked.glob("*.py"):
        file.write_text(file.read_text() + f"\nopen({str(canary)!r}, 'a').write({file.name!r})\n")

    assert set(load(marked, False, tmp_path / "home")) == {"refused"}
    run = subprocess.run(
        [*SERVE, str(marked)], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, stdin=subprocess.DEVNULL
    )
    assert run.returncode != 0 and "trust_remote_code" in run.stderr
    assert not canary.exists()

    assert load(marked, True, tmp_path / "home") == ["loaded"] * 6  # the mark is one
    assert "modeling_panorama.py" in canary.read_text()


def test_the_page_of_serving_does_what_it_says(server, folder, chat, tmp_path, monkeypatch, capsys):
    """`docs/serve.md`, with this server's address."""
    page = (SAMPLES.parent / "docs/serve.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "samples").symlink_to(SAMPLES)
    monkeypatch.chdir(tmp_path)
    code = code.replace("http://127.0.0.1:8000", server[0]).replace("build/demo/model", str(folder))
    exec(code.replace("max_tokens=64", "max_tokens=12"), {})
    data = base64.b64encode((SAMPLES / "park.jpg").read_bytes()).decode()
    asked = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}]
    asked += [{"type": "text", "text": "What is behind me?"}]
    expected = chat([{"role": "user", "content": asked}]).choices[0].message.content
    assert capsys.readouterr().out == f"{expected}\n"
