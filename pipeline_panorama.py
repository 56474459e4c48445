"""The pipeline that travels with a model: ask about panoramas, point at things, list and describe what is around.

`pipeline("panorama-text-to-text", model=FOLDER, trust_remote_code=True)` gives it, whether or not the package is
installed; `PanoramaPipeline(model, processor=processor)` does where it is.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, tee
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.generation import BaseStreamer, StoppingCriteriaList

from .conversations_panorama import STEPS, Message, image_parts, normalized
from .exports_panorama import (
    crop_place,
    draw_places,
    named,
    to_coco,
    to_geojson,
    to_pannellum,
    to_photo_sphere_viewer,
    view_around,
    whole_sphere,
)
from .headings_panorama import check_headings, elect, turned_back, turned_chat
from .image_processing_panorama import READ_OPTIONS, join_views
from .options_panorama import check_number, check_option_names, check_text, check_whole
from .places_panorama import SECTORS, NamedPlace, read_places, wrap
from .processing_panorama import split_steps
from .reading_panorama import Layout, layout_of

# The words in which the default model learned to answer. `{what}` is what is asked for, `{all}` several of it.
PROMPTS = {
    "point": "Where exactly is the {what}? Answer with [yaw, pitch, x_fov, y_fov] in degrees.",
    "detect": "List the places of all {all} from left to right as [yaw, pitch, x_fov, y_fov] in degrees, [] if none.",
    "describe": "What was put in front of you, from left to right?",
    "look": "{what}\nAnswer with [yaw, pitch, x_fov, y_fov] in whole degrees.",
}
COMPASS = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
EXPORTS = ("pannellum", "photo_sphere_viewer", "geojson", "coco", "drawing", "crops")
_MOST_TOKENS = 256  # of an answer, where nothing else is said
_CLOSER = (30.0, 60.0)  # degrees of the views that look twice; training shows such
_MOST_VIEWS = 4  # of these
_MOST_DIRECTIONS = 360
_LONGEST_NAME = 2048  # characters of a path or an address: what is longer is base64
_PITCHES = range(-85, 90, 10)  # in which a direction may be seen

Reader = Callable[[list[Any]], Any]  # makes a result of answers


class Described(NamedTuple):
    """What is in one direction.

    Attributes:
        yaw: degrees to the right of the front, in [-180, 180).
        bearing: compass direction in [0, 360), `None` where the file does not say where north is.
        name: the compass point where it is known, else the direction from the front, such as `back-left`.
        text: what the model says; `None` where the camera did not look.
    """

    yaw: float
    bearing: float | None
    name: str
    text: str | None

    def __str__(self) -> str:
        angle = self.yaw if self.bearing is None else self.bearing
        return f"{self.name} ({round(angle) % 360}°): {'not in the picture' if self.text is None else self.text}"


class PanoramaPipeline(Pipeline):
    """Asks a :class:`PanoramaVLM` about panoramas.

    Every verb takes one panorama (see :meth:`PanoramaImageProcessor.preprocess`) and gives one result, or a list of
    them and gives a list, or an iterator or a torch `Dataset` and gives an iterator that reads as it goes. Options of
    all: `batch_size` and `num_workers` as of any pipeline, and what `generate` takes. Answers are decoded greedily and
    at most 256 tokens long where these say nothing else.

    Args:
        model, processor: that belong together.
        prompts: other words for `point`, `detect`, `describe` and `look` (:data:`PROMPTS`), for models that learned
            others.
        kwargs: as for any pipeline, and defaults of the options.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args: Any, prompts: dict[str, str] | None = None, **kwargs: Any):
        prompts = {} if prompts is None else prompts
        if not isinstance(prompts, dict):
            raise ValueError(f"prompts must be a dict of texts, got {prompts!r}")
        check_option_names(map(str, prompts), PROMPTS, "the prompts of a pipeline")
        for verb, words in prompts.items():
            try:
                check_text(f"prompts[{verb!r}]", words).format(what="", all="")
            except (KeyError, IndexError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"prompts[{verb!r}] must be a text with {{what}} or {{all}} in it, and other braces doubled, got "
                    f"{words!r}"
                ) from error
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("PanoramaPipeline needs the processor of its model: hand it over as processor=")
        self.prompts = {**PROMPTS, **prompts}

    # Asking

    def __call__(
        self,
        inputs: Any,
        question: str | Sequence[str] | None = None,
        *,
        look_twice: bool | str = False,
        headings: int = 1,
        turn_words: bool | None = None,
        **options: Any,
    ) -> Any:
        """Ask.

        Args:
            inputs: a panorama, or many; without `question`, what holds questions too: `{"panorama": ..., "question":
                ...}`, or a chat (messages as for :meth:`PanoramaProcessor.apply_chat_template`), or many of these.
            question: of the panorama, or one for each of many; of one panorama several give a list.
            look_twice: ask first where to look, cut narrower views there, and answer with them beside the others.
                `True` asks for the place of what the question is about, and not where the question names places
                itself; a text such as `"red cube"` asks for that.
            headings: ask so often, the panorama turned a little further each time, and take the answer that is given
                at most of them, with its places turned back. Not for questions about what is in a direction: the words
                of the question stay as they are (`describe` is for those).
            turn_words: with headings, whether words of direction in answers ("front-left") are seen from the front of
                the panorama, and turn back too; it must be said.
            options: see the class.

        Returns:
            Of each `{"answer": str, "steps": str, "places": list[NamedPlace], "cut_off": bool,
            "looked_at": [(yaw, pitch, fov), ...]}`: what was said, the steps before it, the places that it names,
            whether it ended with `max_new_tokens` and not by itself, and the further views that were seen. With
            headings also `"agreement"`, the share of them at which it was given, `"heading"`, degrees to the right: the
            first such one, at which the steps were said, and `"votes"`, the answers at all of them, turned back (`None`
            where a place is written so that it cannot be turned).

        Raises:
            ValueError: for a panorama that cannot be read, and for as many questions as there are not panoramas.
        """
        inputs = _paired(inputs, question)
        _check_look_twice(look_twice)
        yaws = check_headings(headings, turn_words)
        if len(yaws) > 1 and look_twice:
            raise ValueError("headings and look_twice do not go together: leave one of them out")
        if isinstance(inputs, list) and not inputs:
            return []
        if len(yaws) > 1:
            return self._voted(inputs, yaws, bool(turn_words), options)
        if look_twice:
            inputs = self._looking(inputs, look_twice, options)
        return super().__call__(inputs, **options)

    def ask(
        self,
        panorama: Any,
        question: str | Sequence[str] | None = None,
        *,
        look_twice: bool | str = False,
        stream: bool = False,
        headings: int = 1,
        turn_words: bool | None = None,
        **options: Any,
    ) -> Any:
        """The answer in words.

        Args:
            panorama, question, look_twice, headings, turn_words, options: as of :meth:`__call__`.
            stream: give the answer piece by piece while it is said, of one question; the pieces joined are the answer,
                and steps before it are left out. Closing the iterator stops the model.

        Returns:
            The answer; a list or an iterator of answers; with `stream` an iterator of pieces.
        """
        if stream:
            inputs = _paired(panorama, question)
            _check_look_twice(look_twice)
            if len(check_headings(headings, turn_words)) > 1:
                raise ValueError(
                    "stream=True gives an answer while it is said, before headings can vote: leave one out"
                )
            if _is_many(inputs):
                raise ValueError("stream=True gives the pieces of one answer: ask one question about one panorama")
            return self._streamed(self._looking(inputs, look_twice, options) if look_twice else inputs, options)
        own: dict[str, Any] = {"look_twice": look_twice, "headings": headings, "turn_words": turn_words}
        said = self(panorama, question, **own, **options)
        if isinstance(said, dict):
            return said["answer"]
        return [each["answer"] for each in said] if isinstance(said, list) else (each["answer"] for each in said)

    def point(self, panorama: Any, what: str | Sequence[str], **options: Any) -> Any:
        """Where something is.

        Args:
            panorama: one, or many.
            what: in words, such as `"red cube"`, or several such.
            options: as of :meth:`__call__`.

        Returns:
            Its places, one for each of `what` as a rule and none where the model names none; the point is `yaw` and
            `pitch` of each, `score` what the answer itself says of how sure it is (`None` where it says nothing).
        """
        return self._places(panorama, what, "point", options)

    def detect(self, panorama: Any, what: str | Sequence[str], **options: Any) -> Any:
        """Where all of a kind are: as :meth:`point`, with `what` in the singular, such as `"cube"`."""
        return self._places(panorama, what, "detect", options)

    def describe(
        self, panorama: Any, directions: int | Sequence[float] = 8, *, prompt: str | None = None, **options: Any
    ) -> Any:
        """What is in each direction: the panorama is turned until it is in front, and the model asked what is there.

        Args:
            panorama: one, or many.
            directions: how many, from the front to the right; or their yaws in degrees.
            prompt: the question about what is in front.
            options: as of :meth:`__call__`.

        Returns:
            A list of :class:`Described`.

        Raises:
            ValueError: for what is no number of directions (at most 360), nor a list of angles; with `headings`.
        """
        if options.get("headings", 1) != 1:
            raise ValueError("describe turns the panorama to each direction itself: leave headings out")
        if isinstance(directions, np.ndarray | torch.Tensor):
            directions = directions.tolist()
        if isinstance(directions, Sequence) and not isinstance(directions, str | bytes):
            yaws = [wrap(float(check_number("a direction", yaw, 90.0, -math.inf))) for yaw in directions]
        else:
            count = check_whole("directions", directions, 8)
            if count > _MOST_DIRECTIONS:
                raise ValueError(f"directions must be at most {_MOST_DIRECTIONS}, got {count}. Typical value: 8")
            yaws = [wrap(360 / count * n) for n in range(count)]
        words = self.prompts["describe"] if prompt is None else check_text("prompt", prompt)

        def asked(panorama: Any) -> tuple[list[Any], Reader]:
            layout = self.layout(panorama)
            seen = [yaw for yaw in yaws if any(layout.sees(yaw, pitch) for pitch in _PITCHES)]
            image = {"type": "image", "image": panorama}
            chats = [_chat([{**image, "yaw_offset": yaw}, {"type": "text", "text": words}]) for yaw in seen]

            def read(said: list[Any]) -> list[Described]:
                texts = {yaw: each["answer"] for yaw, each in zip(seen, said, strict=True)}
                return [Described(yaw, layout.bearing(yaw), _name_of(yaw, layout), texts.get(yaw)) for yaw in yaws]

            return chats, read

        return self._of_each(panorama, asked, options)

    def _places(self, panorama: Any, what: str | Sequence[str], verb: str, options: dict[str, Any]) -> Any:
        wanted = _texts("what", what)

        def read(said: list[Any]) -> list[NamedPlace]:
            cut = [name for name, answer in zip(wanted, said, strict=True) if answer["cut_off"]]
            if cut:
                words = f"the answer about {', '.join(cut)} was cut off, and places may be missing"
                warnings.warn(f"{words}: raise max_new_tokens", stacklevel=4)
            return [
                place._replace(label=place.label or name)
                for name, answer in zip(wanted, said, strict=True)
                for place in answer["places"]
            ]

        def asked(panorama: Any) -> tuple[list[Any], Reader]:
            words = [self.prompts[verb].format(what=each, all=_plural(each)) for each in wanted]
            return [{"panorama": panorama, "question": each} for each in words], read

        return self._of_each(panorama, asked, options)

    def _of_each(
        self, panoramas: Any, asked: Callable[[Any], tuple[list[Any], Reader]], options: dict[str, Any]
    ) -> Any:
        """What is made of the answers to what is asked about a panorama, for one panorama or many."""
        if not _is_many(panoramas):
            return next(self._of_each(iter([panoramas]), asked, options))
        first, second = tee(asked(each) for each in _each_of(panoramas))
        said = iter(self((one for questions, _ in first for one in questions), **options))
        results = (read(list(islice(said, len(questions)))) for questions, read in second)
        return list(results) if isinstance(panoramas, list | tuple) else results

    def _voted(self, inputs: Any, yaws: list[float], turn_words: bool, options: dict[str, Any]) -> Any:
        """The answers that are given at most headings."""

        def asked(each: Any) -> tuple[list[Any], Reader]:
            messages = _messages(each)
            return [{"messages": turned_chat(messages, yaw)} for yaw in yaws], read

        def read(said: list[Any]) -> dict[str, Any]:
            answers = [turned_back(one["answer"], yaw, turn_words) for one, yaw in zip(said, yaws, strict=True)]
            number, agreement = elect(answers)
            answer = answers[number] or ""
            found = {**said[number], "answer": answer, "places": read_places(answer)}
            return {**found, "agreement": agreement, "heading": yaws[number], "votes": answers}

        return self._of_each(inputs, asked, options)

    # Looking twice

    def _looking(self, inputs: Any, what: bool | str, options: dict[str, Any]) -> Any:
        """The same questions with further views of the places that they name, or else of where the model itself says
        that one should look."""
        if not _is_many(inputs):
            return self._looking([inputs], what, options)[0]
        chats = (_messages(each) for each in _each_of(inputs))
        first, second = tee((chat, [] if isinstance(what, str) else read_places(_last_words(chat))) for chat in chats)
        found = iter(super().__call__((self._where(chat, what) for chat, places in first if not places), **options))
        closer = (_closer(chat, places or next(found)["places"]) for chat, places in second)
        return list(closer) if isinstance(inputs, list) else closer

    def _where(self, messages: list[Message], what: bool | str) -> dict[str, Any]:
        """The chat that asks where to look instead of its last question."""
        words = _last_words(messages)
        if isinstance(what, str):
            words = self.prompts["point"].format(what=what)
        elif "x_fov" not in words:  # it asks for a place already
            words = self.prompts["look"].format(what=words)
        images = [part for part in messages[-1]["content"] if part["type"] == "image"]
        return {"messages": [*messages[:-1], {**messages[-1], "content": [*images, {"type": "text", "text": words}]}]}

    # Streaming

    def _streamed(self, inputs: Any, options: dict[str, Any]) -> Iterator[str]:
        """The answer to one question in pieces."""
        options = {name: value for name, value in options.items() if name not in ("batch_size", "num_workers")}
        _, generate_options, _ = self._sanitize_parameters(**options)
        prepared = self.preprocess(inputs)
        prompt = self.processor.tokenizer.decode(prepared["inputs"]["input_ids"][0, -32:])
        thinking = prompt.rfind(STEPS[0]) > prompt.rfind(STEPS[1])  # the template has opened the steps itself
        said, stop = _Said(), threading.Event()

        def stopped(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        def speak() -> None:
            try:
                own = {
                    "streamer": said,
                    "stopping_criteria": StoppingCriteriaList([stopped]),
                    **self._forward_params,
                    **generate_options,
                }
                self.forward(prepared, **own)
                said.queue.put(None)
            except BaseException as error:  # raised where it is read
                said.queue.put(error)

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        ids: list[int] = []
        shown = ""
        try:
            while (new := said.queue.get()) is not None:
                if isinstance(new, BaseException):
                    raise new
                ids += new
                text = _answer_so_far(self.processor.tokenizer.decode(ids, skip_special_tokens=True), thinking)
                if len(text) > len(shown) and text.startswith(shown):
                    yield text[len(shown) :]
                    shown = text
            answer = split_steps(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).answer
            if answer.startswith(shown) and answer != shown:
                yield answer[len(shown) :]
        finally:
            stop.set()
            speaker.join()

    # Handing on

    def layout(self, panorama: Any) -> Layout:
        """How a panorama's file lies on the sphere, as this model's processor shows it."""
        processor = self.processor.image_processor
        options = {name: getattr(processor, name) for name in ("align_heading", "level", "projection")}
        return layout_of(processor.fetch_images(panorama), **options)

    def export(self, panorama: Any, places: Sequence[NamedPlace], to: str, name: str = "", **options: Any) -> Any:
        """Places in the form of something else (`exports_panorama.py`).

        Args:
            panorama: they are places of.
            places: of :meth:`point` and :meth:`detect`.
            to: `"pannellum"`, `"photo_sphere_viewer"`, `"geojson"` or `"coco"` give a dict for `json.dumps`;
                `"drawing"` a picture of the whole sphere with them drawn in; `"crops"` a list of pictures, one a place.
            name: address or name of the panorama's file in what is written; that of a path where it is not given.
            options: of the function that makes it, such as `reach` of GeoJSON, `width` of a drawing.

        Raises:
            ValueError: for another form, and where the panorama does not allow it; the message says why.
        """
        if to not in EXPORTS:
            raise ValueError(f"places can be exported to {', '.join(EXPORTS)}, got {to!r}")
        check_text("name", name)
        if to in ("drawing", "crops"):
            own = {
                name: getattr(self.processor.image_processor, name) for name in READ_OPTIONS if name != "strict_aspect"
            }
            source = self.processor.image_processor.fetch_images(panorama)
            picture = whole_sphere(source, options.pop("width", None), **own)
            if to == "drawing":
                return draw_places(picture, places, **options)
            return [crop_place(picture, each.place, **options) for each in named(places)]
        is_named = isinstance(panorama, str | os.PathLike) and len(os.fspath(panorama)) < _LONGEST_NAME
        name = name or (os.fspath(panorama) if is_named and not str(panorama).startswith("data:") else "")
        layout = self.layout(panorama)
        if to == "coco":
            return to_coco([(name, layout, places)], **options)
        write = {"pannellum": to_pannellum, "photo_sphere_viewer": to_photo_sphere_viewer, "geojson": to_geojson}[to]
        return write(places, layout, name, **options)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """The model and its processor, with this pipeline's code, as a folder that `pipeline` loads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    # What transformers asks of a pipeline

    def _sanitize_parameters(self, generate_kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        return {}, {**options, **(generate_kwargs or {})}, {}

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        """Model inputs of one question."""
        messages = _messages(inputs)
        made = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        views = [tuple(view) for part in image_parts(messages) for view in part.get("further_views") or ()]
        return {"inputs": dict(made), "looked_at": views}

    def _forward(self, prepared: dict[str, Any], **options: Any) -> dict[str, Any]:
        given = prepared["inputs"]
        inputs = self._joined(given) if isinstance(given, list) else given
        options = {"do_sample": False, **options}
        if options.get("max_new_tokens") is None:
            options["max_new_tokens"] = _MOST_TOKENS
        output = self.model.generate(
            **inputs, **options, return_dict_in_generate=True, tokenizer=self.processor.tokenizer
        )
        if len(output.text) != len(inputs["input_ids"]):
            raise ValueError("a question has one answer: num_return_sequences must be 1")
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = set(ends) if isinstance(ends, list) else {ends}
        cut_off = [
            len(row) >= options["max_new_tokens"] and not ends & set(row) for row in output.generated_ids.tolist()
        ]
        if not isinstance(given, list):
            return {"text": output.text[0], "cut_off": cut_off[0], "looked_at": prepared["looked_at"]}
        return {"text": output.text, "cut_off": cut_off, "looked_at": prepared["looked_at"]}

    def _joined(self, each: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Inputs of single questions as one batch, padded on the left."""
        views = ("pixel_values", "view_mask", "further_views")
        texts = [{name: value[0].tolist() for name, value in one.items() if name not in views} for one in each]
        batch = self.processor.tokenizer.pad(texts, padding_side="left", return_tensors="pt").to(self.device)
        return {**batch, **join_views([one for one in each if "pixel_values" in one])}

    def postprocess(self, said: dict[str, Any]) -> dict[str, Any]:
        """The answer and what is in it."""
        answer, steps = split_steps(said["text"])
        looked_at = [tuple(view) for view in said["looked_at"]]
        found = {"answer": answer, "steps": steps, "places": read_places(answer)}
        return {**found, "cut_off": said["cut_off"], "looked_at": looked_at}


class _Said(BaseStreamer):
    """Takes the ids that `generate` says, after those of the prompt."""

    def __init__(self) -> None:
        self.queue: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.queue.put(value.flatten().tolist())
        self.prompt = False

    def end(self) -> None:
        """Whoever runs `generate` says when it has ended."""


def _answer_so_far(text: str, thinking: bool) -> str:
    """What can be shown of an answer that goes on: nothing of its steps, of a character that is not whole, or of
    white space that may be its end."""
    opens, closes = STEPS
    text = text.lstrip()
    if thinking or text.startswith(opens):
        text = text.partition(closes)[2].lstrip()
    elif opens.startswith(text):
        return ""
    return text.rstrip("\ufffd").rstrip()


# Inputs


def _is_chat(inputs: Any) -> bool:
    is_list = isinstance(inputs, list | tuple) and len(inputs) > 0
    return is_list and (hasattr(inputs[0], "role") or (isinstance(inputs[0], dict) and "role" in inputs[0]))


def _is_many(inputs: Any) -> bool:
    """Whether these are several panoramas (or questions), and not one of the many things that a panorama can be."""
    if isinstance(inputs, str | bytes | bytearray | memoryview | np.ndarray | torch.Tensor) or hasattr(inputs, "read"):
        return False
    return isinstance(inputs, Sequence | Iterator | Dataset) and not _is_chat(inputs)


def _each_of(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, Dataset):
        return (inputs[place] for place in range(len(inputs)))  # type: ignore[arg-type]
    return inputs


def _paired(inputs: Any, question: str | Sequence[str] | None) -> Any:
    """Panoramas with their questions: one, a list, or what is read as it goes."""
    if isinstance(question, Iterator) and not isinstance(inputs, list | tuple):  # both are read as they come
        question = (check_text("question", each) for each in question)
    elif question is not None and not isinstance(question, str):
        question = _texts("question", question)
    if _is_chat(inputs):
        if question is not None:
            raise ValueError("a chat holds its question: leave question out, or hand over a panorama")
        return {"messages": list(inputs)}
    if not _is_many(inputs):
        if question is None or isinstance(question, str):
            return inputs if question is None else {"panorama": inputs, "question": question}
        return [{"panorama": inputs, "question": each} for each in question]
    pairs: Iterable[Any]
    if question is None:
        if isinstance(inputs, Dataset):  # whose workers make it ready
            return inputs
        pairs = ({"messages": each} if _is_chat(each) else each for each in inputs)
    elif isinstance(question, str):
        pairs = ({"panorama": each, "question": question} for each in _each_of(inputs))
    else:
        if isinstance(inputs, list | tuple) and len(inputs) != len(question):
            raise ValueError(f"got {len(question)} questions for {len(inputs)} panoramas: one for each, or one for all")
        both = zip(_each_of(inputs), question, strict=True)
        pairs = ({"panorama": panorama, "question": words} for panorama, words in both)
    return list(pairs) if isinstance(inputs, list | tuple) else pairs


def _texts(name: str, value: Any) -> list[str]:
    """One text, or several. Raises `ValueError` for what is neither."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes) or not isinstance(value, Iterable) or isinstance(value, dict):
        raise ValueError(f"{name} must be a text or a list of texts, got {value!r}")
    return [check_text(name, each) for each in value]


def _check_look_twice(what: Any) -> None:
    if not isinstance(what, bool | str):
        raise ValueError(f"look_twice must be true, false, or what to look for in words, got {what!r}")


def _chat(parts: list[Message]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": parts}]}


def _messages(inputs: Any) -> list[Message]:
    """The chat of one question, whose contents are lists of parts."""
    if not isinstance(inputs, dict) or {"bytes", "path"} & inputs.keys():
        inputs = {"panorama": inputs, "question": ""}  # the processor asks its default prompt, and says so
    if "messages" not in inputs:
        panorama = next((inputs[key] for key in ("panorama", "image") if inputs.get(key) is not None), None)
        words = next((inputs[key] for key in ("question", "text") if inputs.get(key) is not None), "")
        if panorama is None:
            raise ValueError(f"an input must hold 'panorama' and 'question', or 'messages', got {sorted(inputs)}")
        inputs = _chat([{"type": "image", "image": panorama}, {"type": "text", "text": words}])
    messages = normalized(inputs["messages"])
    return [
        {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}
        for message in messages
        for content in [message["content"]]
    ]


def _last_words(messages: list[Message]) -> str:
    return "\n".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")


def _closer(messages: list[Message], places: Sequence[NamedPlace]) -> dict[str, Any]:
    """A chat whose last panorama is seen from closer where places lie."""
    views = [view_around(each.place, 1.5, *_CLOSER) for each in islice(places, _MOST_VIEWS)]
    parts = image_parts(messages)
    if not parts or not views:
        return {"messages": messages}
    part = parts[-1]
    seen = [*(part.get("further_views") or ()), *((view.yaw, view.pitch, view.fov) for view in views)]

    def changed(own: Message) -> Message:
        return {**own, "further_views": seen} if own is part else own

    return {"messages": [{**each, "content": [changed(own) for own in each["content"]]} for each in messages]}


# Words


def _name_of(yaw: float, layout: Layout) -> str:
    bearing = layout.bearing(yaw)
    return SECTORS[round(yaw / 45) % 8] if bearing is None else COMPASS[round(bearing / 45) % 8]


def _plural(words: str) -> str:
    if words.endswith(("s", "x", "z", "ch", "sh")):
        return f"{words}es"
    return f"{words[:-1]}ies" if words.endswith("y") and words[-2:-1] not in "aeiou" else f"{words}s"
