"""The page: look around in a panorama, ask a model about it, see where its answers lie.

`python -m panorama_vlm.demo [MODEL]` serves it on this machine alone (`--host` says otherwise). `app.py` is the same as
a Space of the Hub. `viewer.js` joins it to Pannellum, the viewer, which lies in `pannellum/` as its npm package has it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import logging
import math
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.generation import StoppingCriteriaList
from transformers.utils import logging as transformers_logging

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the page needs Gradio: pip install 'panorama-vlm[demo]'") from error

from ..exports_panorama import whole_sphere
from ..image_processing_panorama import READ_OPTIONS
from ..modeling_panorama import PanoramaVLM
from ..options_panorama import check_whole
from ..pictures import draw_saliency, draw_views, saliency, to_image
from ..pipeline_panorama import PanoramaPipeline
from ..places_panorama import check_bfov, read_places
from ..placing_panorama import seen_everywhere
from ..processing_panorama import PanoramaProcessor
from ..reading_panorama import read_panorama
from ..synthetic.write import METADATA, SAMPLES, World, write_scenes

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ABOUT = "What is at [{}, {}, {}, {}]? (yaw, pitch, x_fov, y_fov in degrees)"  # as the default model learned it
QUESTIONS = (  # about a panorama that brings none
    "What was put in front of you, from left to right?",
    "Where exactly is the red cube? Answer with [yaw, pitch, x_fov, y_fov] in degrees.",
    "List the places of all balls from left to right as [yaw, pitch, x_fov, y_fov] in degrees, [] if none.",
    "How many things were put around you?",
)
ENDINGS = [".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif", ".tif", ".tiff", ".bmp", ".jp2", ".hdr", ".exr"]
MOST_PIXELS = 2**27  # of an upload while it is decoded; JPEGs are decoded at reduced size, so that theirs may be more
_WIDTH = 4096  # pixels of the panorama in the viewer, at most: what the graphics of every phone take
_LONGEST = 2000  # characters of a question
_REMEMBERED = 10  # turns of the chat that the model is shown with a question, even
_WAITING = 64  # visitors in the queue, at most
_SCENES, _SEED = 6, 2026  # that are rendered where no samples are named; no configuration trains on this seed
_SHOWN = 4  # questions of a sample
_STOPPED = " … (stopped)"
_FORGET = (600, 4 * 3600)  # seconds: how often uploads are looked through, and how old they become
_TEMPLATE = """<div class="panorama" tabindex="0" role="application"
  aria-label="Panorama. Arrow keys look around, plus and minus zoom, Enter asks what is in the middle."></div>
<div class="look"><p>Drag to look around; click a thing to ask what it is.</p>
<button type="button" class="ask-middle">Ask what is in the middle</button></div>
<ol class="places" aria-label="Places in the answer"></ol>
<div class="samples" role="group" aria-label="Samples">{samples}</div>"""

_QUESTIONS = """<div class="questions" role="group" aria-label="Questions to begin with">
{{#each value}}<button type="button">{{this}}</button>{{/each}}</div>"""
_PICK = "element.onclick = ({target}) => target.matches('button') && trigger('click', {words: target.textContent});"

Turns = list[dict[str, str]]


class Sample(NamedTuple):
    """A panorama that visitors may pick, with questions about it."""

    file: Path
    questions: tuple[str, ...]

    @property
    def name(self) -> str:
        """For visitors; rendered scenes have numbers."""
        return f"scene {int(self.file.stem)}" if self.file.stem.isdecimal() else self.file.stem


def read_samples(folder: Path) -> list[Sample]:
    """The panoramas that `metadata.jsonl` of a folder names, with what its conversations or its `query` ask.

    Raises:
        ValueError: for a line that is none or names a file outside the folder (its number is named), and for no line.
        OSError: where there is no `metadata.jsonl`.
    """
    questions: dict[Path, list[str]] = {}
    for number, line in enumerate((folder / METADATA).read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            turns = [turn["value"] for turn in row.get("conversations") or () if turn["from"] == "human"]
            asked = [words.replace("<image>", "").strip() for words in turns or [row.get("query") or ""]]
            file = folder / row["file_name"]
            if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):  # links are the owner's
                raise ValueError(f"{row['file_name']!r} lies outside the folder")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(
                f"line {number} of {str(folder / METADATA)!r} is no JSON object with file_name and query: {error}"
            ) from error
        questions.setdefault(file, []).extend(filter(None, asked))
    if not questions:
        raise ValueError(f"{str(folder / METADATA)!r} has no line: each is a JSON object with file_name and query")
    return [Sample(file, tuple(words[:_SHOWN])) for file, words in questions.items()]


class Page:
    """What the page does for all of its visitors; of a visitor Gradio keeps the file of the panorama and the turns.

    Args:
        pipeline: answers.
        samples: panoramas to pick from; the first is there at the beginning.
        title, about: of the page, in words.
        max_new_tokens: of an answer, at most.
    """

    def __init__(
        self,
        pipeline: PanoramaPipeline,
        samples: Sequence[Sample],
        title: str = "PanoramaVLM",
        about: str = "",
        max_new_tokens: int = 256,
    ):
        self.pipeline, self.samples, self.title, self.about = pipeline, samples, title, about
        self.max_new_tokens = check_whole("max_new_tokens", max_new_tokens, 256)
        self.answering: dict[str, threading.Event] = {}  # of a session: set to stop its answer

    # Showing

    def open(self, file: str, name: str, questions: Sequence[str] = QUESTIONS) -> tuple[Any, ...]:
        """What the page shows of a panorama: its file, the viewer, a note, chat and turns, questions, the views, and no
        answer to stop or to look into."""
        processor = self.pipeline.processor.image_processor
        options = {option: getattr(processor, option) for option in READ_OPTIONS}
        try:
            with warnings.catch_warnings(record=True) as warned:  # of what was guessed, of one file at a time
                warnings.simplefilter("always")
                panorama = read_panorama(file, _WIDTH, **options)
            bearing = self.pipeline.layout(file).bearing(0.0)
        except Exception as error:  # whatever a decoder raises
            reason = _sentence(error, file, name)
            wrong = f'<span class="wrong" role="alert">{reason}</span>'
            return gr.skip(), gr.skip(), wrong, *[gr.skip()] * 4, *_NOTHING
        pixels = panorama.pixels
        pixels = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)
        seen = seen_everywhere(panorama)
        picture = Image.fromarray(pixels.numpy())
        notes = [name]
        if seen is not None:
            picture = _hatched(picture, seen.numpy())
            notes[0] += f": {_share(seen.numpy()):.0%} of the sphere. What is striped is missing."
        notes += [words.replace(file, name) for each in warned if file in (words := str(each.message))]
        if picture.width > _WIDTH:
            picture = picture.resize((_WIDTH, _WIDTH // 2), Image.Resampling.LANCZOS)
        views = to_image(draw_views(picture, processor.view_plan))
        viewer: dict[str, Any] = {"panorama": _data_url(picture), "name": name, "bearing": bearing, "places": []}
        alt = "The views that the model is shown, and their outlines on the panorama"
        shown_to_model = f'<img alt="{alt}" src="{_data_url(views)}">'
        return file, viewer, html.escape(" ".join(notes)), [], [], list(questions), shown_to_model, *_NOTHING

    def open_upload(self, file: str | None, request: gr.Request) -> tuple[Any, ...]:
        """As :meth:`open`, and an empty field for the next upload."""
        self.drop(request)
        return *self.open(file or "", Path(file or "").name), None

    def open_sample(self, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """As :meth:`open`, of the sample that was picked."""
        self.drop(request)
        return self.open_number(int(event.sample))

    def open_number(self, number: int = 0) -> tuple[Any, ...]:
        """As :meth:`open`, of a sample."""
        sample = self.samples[number % len(self.samples)]
        return self.open(str(sample.file), sample.name, sample.questions)

    # Answering

    def ask(self, words: str, turns: Turns, file: str | None, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Answer what is typed."""
        yield from self.answer(words, turns, file, request)

    def ask_listed(
        self, turns: Turns, file: str | None, request: gr.Request, event: gr.EventData
    ) -> Iterator[tuple[Any, ...]]:
        """Answer one of the questions that the page lists."""
        yield from self.answer(str(event.words), turns, file, request)

    def ask_direction(
        self, turns: Turns, file: str | None, request: gr.Request, event: gr.EventData
    ) -> Iterator[tuple[Any, ...]]:
        """Say what is where somebody clicked."""
        words = ABOUT.format(*check_bfov(event.bfov).rounded())
        yield from self.answer(words, turns, file, request)

    def ask_again(
        self, turns: Turns, file: str | None, request: gr.Request, event: gr.RetryData
    ) -> Iterator[tuple[Any, ...]]:
        """Answer once more, by chance where the first answer was the likeliest one."""
        index = int(event.index if isinstance(event.index, int) else event.index[0])
        if index < len(turns):
            sampled = {"do_sample": True, "temperature": 0.7}
            yield from self.answer(turns[index]["content"], turns[:index], file, request, **sampled)

    def answer(
        self, words: str, turns: Turns, file: str | None, request: gr.Request, **options: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Stream an answer: chat and turns, the viewer, the field for questions, the button that stops, the one that
        shows where the answer looked, and no such picture yet."""
        words = words.strip()[:_LONGEST]
        if not words or file is None:
            return
        stop = self.answering[str(request.session_hash)] = threading.Event()
        said = {"role": "assistant", "content": ""}
        turns = [*turns, {"role": "user", "content": words}, said]

        def stopped(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        yield turns, turns, {"places": []}, "", gr.Button(interactive=True), _IDLE, ""
        options |= {"max_new_tokens": self.max_new_tokens, "stopping_criteria": StoppingCriteriaList([stopped])}
        try:
            # Held by a name: it waits for the model when it is dropped, which must be told to stop before.
            pieces = self.pipeline.ask(_messages(turns[-_REMEMBERED:-1], file), stream=True, **options)
            for piece in pieces:
                if self.answering.get(str(request.session_hash)) is not stop:
                    return  # nobody waits for it any more
                said["content"] += piece
                yield turns, turns, *[gr.skip()] * 5
            answered = bool(said["content"])
            said["content"] += _STOPPED if stop.is_set() else "" if answered else "(no answer)"
        except Exception as error:
            answered = False
            said["content"] = f"That could not be answered: {_sentence(error, file, 'the panorama')}"
        finally:
            stop.set()
            dropped = self.answering.pop(str(request.session_hash), None) is not stop
        if dropped:
            return
        places = [{"label": each.label, "bfov": list(each.place)} for each in read_places(said["content"])]
        yield turns, turns, {"places": places}, gr.skip(), _IDLE, gr.Button(interactive=answered), gr.skip()

    def look(self, turns: Turns, file: str | None) -> str:
        """Where the last answer looked, as a picture of the panorama."""
        if len(turns) < 2 or file is None:
            return ""
        answer = turns[-1]["content"].removesuffix(_STOPPED)
        processor = self.pipeline.processor.image_processor
        try:
            asked = {"messages": _messages(turns[-_REMEMBERED:-1], file)}
            found = saliency(self.pipeline, asked, answer)
            picture = whole_sphere(file, _WIDTH // 4, **{name: getattr(processor, name) for name in READ_OPTIONS})
            drawn = to_image(draw_saliency(picture, found, bar=False), 200)
        except Exception as error:
            return f'<span class="wrong" role="alert">{_sentence(error, file, "the panorama")}</span>'
        row, column = np.unravel_index(found.heat.argmax(), found.heat.shape)
        height, width = found.heat.shape
        yaw, pitch = round((column + 0.5) / width * 360 - 180), round(90 - (row + 0.5) / height * 180)
        words = f"The answer looked most at yaw {yaw}°, pitch {pitch}°; the line is around a tenth of the sphere."
        return f'<img alt="Heat map on the panorama" src="{_data_url(drawn)}"><p>{words}</p>'

    def stop(self, request: gr.Request) -> None:
        """End the answer that this visitor is being given."""
        if (event := self.answering.get(str(request.session_hash))) is not None:
            event.set()

    def drop(self, request: gr.Request) -> None:
        """End it, and say no more of it: it is about what is shown no longer."""
        if (event := self.answering.pop(str(request.session_hash), None)) is not None:
            event.set()

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """No turns, no places, nothing to stop."""
        self.drop(request)
        return [], {"places": []}, *_NOTHING

    # The page

    def build(self) -> gr.Blocks:
        """The page; `launch(**LOOK)` serves it."""
        viewer_code = "\n".join((HERE / file).read_text("utf-8") for file in ("pannellum/pannellum.js", "viewer.js"))
        samples = "".join(_thumbnail(sample) for sample in self.samples)
        with gr.Blocks(title=self.title, analytics_enabled=False, delete_cache=_FORGET, fill_width=True) as page:
            file, turns = gr.State(), gr.State([])
            gr.HTML(f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.about)}</p>")
            with gr.Row():
                with gr.Column(scale=3, min_width=340):
                    viewer = gr.HTML(
                        html_template=_TEMPLATE.format(samples=samples), js_on_load=viewer_code, apply_default_css=False
                    )
                    note = gr.HTML(html_template='<p class="note" role="status">${value}</p>', apply_default_css=False)
                with gr.Column(scale=2, min_width=340):
                    chat = gr.Chatbot(
                        label="Answers",
                        height="min(46vh, 460px)",
                        render_markdown=False,
                        latex_delimiters=[],
                        buttons=["copy"],
                        elem_id="chat",
                    )
                    words = gr.Textbox(
                        label="Question",
                        placeholder="Ask about the panorama",
                        max_length=_LONGEST,
                        submit_btn="Ask",
                        elem_id="question",
                    )
                    listed = gr.HTML([], html_template=_QUESTIONS, js_on_load=_PICK, apply_default_css=False)
                    with gr.Row():
                        stop = gr.Button("Stop", interactive=False, size="sm", elem_id="stop")
                        look = gr.Button("Where did it look?", interactive=False, size="sm", elem_id="look")
                    looked = gr.HTML(elem_classes="views", elem_id="looked")
            upload = gr.File(label="Your own panorama", file_types=ENDINGS, height=100, elem_id="upload")
            with gr.Accordion("What the model sees", open=False):
                views = gr.HTML(elem_classes="views")
            shown: list[Any] = [file, viewer, note, chat, turns, listed, views, stop, look, looked]
            answered: list[Any] = [chat, turns, viewer, words, stop, look, looked]
            looks: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 1, "api_visibility": "private"}
            asks: dict[str, Any] = {"concurrency_id": "ask", "concurrency_limit": 1, "api_visibility": "private"}
            words.submit(self.ask, [words, turns, file], answered, **asks)
            listed.click(self.ask_listed, [turns, file], answered, **asks)
            viewer.click(self.ask_direction, [turns, file], answered, **asks)
            chat.retry(self.ask_again, [turns, file], answered, **asks)
            look.click(self.look, [turns, file], looked, **asks)
            page.load(self.open_number, None, shown, **looks)
            viewer.select(self.open_sample, None, shown, **looks)
            upload.upload(self.open_upload, upload, [*shown, upload], **looks)
            chat.clear(self.clear, None, [turns, viewer, stop, look, looked], queue=False, api_visibility="private")
            stop.click(self.stop, queue=False, api_visibility="private")
            page.unload(self.drop)  # of who leaves
        page.queue(max_size=_WAITING, api_open=False)
        return page


_IDLE = gr.update(interactive=False)  # a button
_NOTHING = (_IDLE, _IDLE, "")  # to stop, to look into, and no picture
LOOK: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css_paths": [HERE / "pannellum" / "pannellum.css", HERE / "page.css"],
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "share": False,
    "ssr_mode": False,
}


def _sentence(error: Exception, file: str, name: str) -> str:
    """What is wrong, in a sentence that names no file of this machine."""
    if not isinstance(error, ValueError | OSError):
        logger.exception("the page could not do what it was asked", exc_info=error)
        return "something went wrong here, which is not your fault. Try again"
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return html.escape(words.replace(file, name) if file else words)


def _messages(turns: Turns, file: str) -> list[dict[str, Any]]:
    """A chat about a panorama, as the processor takes it."""
    parts: list[list[dict[str, Any]]] = [[{"type": "text", "text": turn["content"]}] for turn in turns]
    parts[0].insert(0, {"type": "image", "image": file})
    return [{"role": turn["role"], "content": content} for turn, content in zip(turns, parts, strict=True)]


def _share(seen: np.ndarray) -> float:
    """The share of the sphere that a mask [h, w] is."""
    height = len(seen)
    weight = np.cos(((np.arange(height) + 0.5) / height - 0.5) * math.pi)
    return float((seen.mean(1) * weight).sum() / weight.sum())


def _hatched(picture: Image.Image, seen: np.ndarray) -> Image.Image:
    """A panorama with stripes where the camera did not look."""
    mask = Image.fromarray(seen).convert("L").resize(picture.size, Image.Resampling.NEAREST)
    down, right = np.arange(picture.height)[:, None], np.arange(picture.width)[None]
    stripes = np.where((down + right) // (picture.height // 32) % 2, 72, 56).astype(np.uint8)
    return Image.composite(picture, Image.fromarray(stripes).convert("RGB"), mask)


def _data_url(picture: Image.Image) -> str:
    """A picture that is part of the page, so that no file has to be served."""
    held = io.BytesIO()
    picture.convert("RGB").save(held, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _thumbnail(sample: Sample) -> str:
    with Image.open(sample.file) as picture:
        picture.draft("RGB", (264, 132))
        url = _data_url(picture.convert("RGB").resize((264, 132)))
    return f'<button type="button"><img alt="" src="{url}"><span>{html.escape(sample.name)}</span></button>'


def make_page(
    model: str = str(ROOT),
    samples: Path | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    max_new_tokens: int = 256,
) -> gr.Blocks:
    """The page of a model.

    Args:
        model: folder, or name on the Hub.
        samples: folder of panoramas with questions (`read_samples`); without it a few scenes are rendered.
        device: where the model runs.
        max_new_tokens: of an answer, at most.

    Raises:
        ValueError, OSError: for a model or samples that cannot be read.
    """
    transformers_logging.disable_progress_bar()
    load = PanoramaVLM.from_checkpoint if Path(model).is_dir() else PanoramaVLM.from_pretrained
    network = load(model).eval().to(device)
    processor = PanoramaProcessor.from_pretrained(model)
    processor.image_processor.max_pixels = min(processor.image_processor.max_pixels, MOST_PIXELS)
    if samples is None:
        world = World(_SEED, _WIDTH // 2, questions=_SHOWN, backgrounds=f"{SAMPLES}:lab,park")
        samples = write_scenes(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")), world, _SCENES, processes=1)
    size = f"{network.num_parameters() / 1e6:,.0f} million parameters"
    about = f"Ask a model of {size} about a 360° panorama."
    if Path(model).resolve() == ROOT:
        about += (
            " It learned from rendered scenes alone: it knows solids and drawn things, and nothing of the real world."
        )
    pipeline = PanoramaPipeline(network, processor=processor)
    return Page(pipeline, read_samples(samples), about=about, max_new_tokens=max_new_tokens).build()


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m panorama_vlm.demo", description="A page to look around in panoramas and to ask a model."
    )
    parser.add_argument("model", nargs="?", default=str(ROOT), help="folder or Hub id (default: the repository)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, help="to listen on (default: the first free one from 7860)")
    parser.add_argument("--samples", type=Path, help="folder of panoramas with questions (default: rendered scenes)")
    parser.add_argument("--max-upload", type=int, default=64, help="MB of an upload, at most (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer, at most (default: 256)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="panorama-page-") as uploads:  # gone with the page
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            page = make_page(options.model, options.samples, options.device, options.max_new_tokens)
        except (ValueError, OSError) as error:
            print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            sys.exit(2)
        size = f"{options.max_upload}mb"
        page.launch(server_name=options.host, server_port=options.port, max_file_size=size, **LOOK)
