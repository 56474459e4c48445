"""Conversations before they become tokens: one form for all ways of writing them, what in them is text and what the
template's own, and where in a rendered conversation the assistant speaks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    _get_control_token_patterns,
    encode_marked_chat,
    mark_control_tokens,
)

from .reading_panorama import from_base64

try:
    from jinja2 import TemplateError
except ImportError:  # transformers needs it to render, and says so then
    TemplateError = RuntimeError  # type: ignore[misc, assignment]

Message = dict[str, Any]

STEPS = ("<think>", "</think>")  # around what is said before an answer
_SOURCES = ("image", "url", "path", "base64")
_NO_MARKS = str.maketrans("", "", _CONTROL_TOKEN_START + _CONTROL_TOKEN_END)
_MOST_KNOWN = 256  # frames
_PRIVATE = range(0xF8000, 0xF9000)  # characters that nobody types; those that mark tokens lie elsewhere


class Frame(NamedTuple):
    """What a template writes around the words of messages of one shape."""

    pieces: list[str]  # before the first words, between them and behind the last
    own: int  # characters before each turn of the assistant that are its own: the generation prompt lacks them


class Turn(NamedTuple):
    """Where in a rendered conversation the assistant speaks, in characters: what it has to say begins where the
    generation prompt ends, and ends with the token that closes its turn."""

    start: int
    end: int
    closed: bool


# One form


def normalized(messages: Sequence[Any]) -> list[Message]:
    """Messages whose contents are strings or lists of parts, each of type `text` (with `text`) or `image` (with
    `image`, where it says which), whatever wrote them.

    The two private characters with which transformers marks what is text are taken out of it: nobody may type them.
    Keys without a value are left out, as Arrow and servers fill them in; a message without words gets empty ones; a
    part of type `image_url` (OpenAI's) is an image; the image of a part is the first of `image`, `url`, `path` and
    `base64` (with or without `data:image/...;base64,`) that has a value.

    Raises:
        TypeError: for what is no message or no part.
        ValueError: for no message at all, a message without a role, a part without a type, and for base64 that is none.
    """
    messages = [_message(message) for message in getattr(messages, "messages", messages)]
    if not messages:
        raise ValueError("a conversation needs at least one message, got none")
    return messages


def _as_dict(thing: Any) -> Any:
    """A message or a part that is a dataclass or a model of pydantic as a dict, all else as it is."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    return thing.model_dump() if callable(getattr(thing, "model_dump", None)) else thing


def _message(message: Any) -> Message:
    message = _as_dict(message)
    if not isinstance(message, Mapping):
        raise TypeError(f"a message is a dict with 'role' and 'content', got {type(message).__name__}")
    given = {name: value for name, value in message.items() if value is not None}
    if not isinstance(given.get("role"), str):
        said = repr(given["role"]) if "role" in given else f"the keys {sorted(given)}"
        raise ValueError(f"a message needs a role, such as 'user', got {said}")
    content = given.get("content", "")
    if not isinstance(content, str):
        if isinstance(content, Mapping) or not isinstance(content, Sequence):
            raise TypeError(f"the content of a message is a string or a list of parts, got {type(content).__name__}")
        return {**given, "content": [_part(part) for part in content]}
    return {**given, "content": content.translate(_NO_MARKS)}


def _part(part: Any) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part.translate(_NO_MARKS)}
    part = _as_dict(part)
    if not isinstance(part, Mapping):
        raise TypeError(f"a part of a message is a dict with a 'type', got {type(part).__name__}")
    given = {name: value for name, value in part.items() if value is not None}
    kind = given.get("type")
    if kind == "text":
        return {**given, "text": str(given.get("text", "")).translate(_NO_MARKS)}
    if kind == "image_url":
        named = given.pop("image_url", None)
        given = {**given, "type": "image", "url": named.get("url") if isinstance(named, Mapping) else named}
    elif not isinstance(kind, str):
        raise ValueError(f"a part of a message needs a type, 'text' or 'image', got the keys {sorted(given)}")
    elif kind != "image":
        return given  # the template refuses it
    found = next((name for name in _SOURCES if given.get(name) is not None), None)
    others = {name: value for name, value in given.items() if name not in _SOURCES}
    if found is None:
        return others
    return {**others, "image": from_base64(given[found]) if found == "base64" else given[found]}


def image_parts(messages: Sequence[Message]) -> list[Message]:
    """The parts of normalized messages that say which image they are, in reading order."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part.get("type") == "image" and "image" in part]


def images_of(messages: Sequence[Message]) -> list[Any]:
    """The panoramas of a normalized conversation, in reading order."""
    return [part["image"] for part in image_parts(messages)]


def shown_by(conversations: Sequence[Sequence[Message]]) -> dict[str, list[Any]]:
    """What the messages say of how their panoramas are shown, as options of the image processor, each in reading
    order; none where they say nothing."""
    parts = [part for messages in conversations for part in image_parts(messages)]
    said: dict[str, list[Any]] = {
        "further_views": [list(part.get("further_views") or []) for part in parts],
        "yaw_offsets": [part.get("yaw_offset") for part in parts],
        "mirrored": [part.get("mirrored") for part in parts],
        "tilts": [part.get("tilt") for part in parts],
    }
    unsaid: dict[str, Any] = {"further_views": [], "yaw_offsets": 0.0, "mirrored": False, "tilts": (0.0, 0.0)}
    return {name: [value or unsaid[name] for value in values] for name, values in said.items() if any(values)}


def words_of(content: str | Sequence[Message]) -> str:
    """The text of a normalized content."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


# What is text


def as_text(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]) -> list[Message]:
    """Normalized messages in which the control tokens that somebody typed are marked as text, for :func:`encode`.

    Control tokens are the special ones of the tokenizer and, where it is not the assistant who speaks, those that the
    template writes: an assistant may think (`<think>`) and call tools in its words.
    """
    everywhere = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    typed, _ = _get_control_token_patterns(tuple(sorted({*everywhere, *tokenizer._get_control_tokens(template)})))
    said, _ = _get_control_token_patterns(tuple(sorted(everywhere - {*STEPS})))
    return [_marked(message, said if message["role"] == "assistant" else typed) for message in messages]


def _marked(message: Message, pattern: Any) -> Message:
    content = message["content"]
    if isinstance(content, str):
        content = mark_control_tokens(content, pattern)
    else:
        content = [
            {**part, "text": mark_control_tokens(part["text"], pattern)} if part.get("type") == "text" else part
            for part in content
        ]
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {**mark_control_tokens(others, pattern), "role": message["role"], "content": content}


def is_marked(messages: Sequence[Message]) -> bool:
    """Whether :func:`as_text` found something."""
    said = ({**message, "content": words_of(message["content"])} for message in messages)
    return any(_CONTROL_TOKEN_START in str(values) for message in said for values in message.values())


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of consecutive pieces of one rendered conversation; nothing is added to them, and what is marked as text
    (:func:`as_text`) is read as text. Each piece is read for itself, as a prompt and its answer are."""

    def read(text: str) -> list[int]:
        if _CONTROL_TOKEN_START in text or _CONTROL_TOKEN_END in text:
            return encode_marked_chat(tokenizer, text)
        return tokenizer.encode(text, add_special_tokens=False)

    newline = read("\n")
    pieces = [read(text) if index == 0 or not text else read("\n" + text) for index, text in enumerate(texts)]
    for index, (text, ids) in enumerate(zip(texts, pieces, strict=True)):
        if index > 0 and text:  # it was read behind a newline: SentencePiece puts a space before what begins a text
            pieces[index] = ids[len(newline) :] if ids[: len(newline)] == newline else read(text)
    return pieces


# Where the assistant speaks


def turns_of_the_assistant(
    render: Callable[..., str],
    messages: Sequence[Message],
    text: str,
    closing: Sequence[str],
    known: dict[Any, Frame | None] | None = None,
) -> list[Turn]:
    """Where in a rendered conversation the assistant speaks, found by comparing renderings.

    Each turn (all at once, where that shows the same) is rendered once more with a character in place of its words that
    stands nowhere else, and one in place of or behind the words before it; what the template writes between the two
    begins as the generation prompt does, and where that ends, the model goes on by itself. So it does not matter what
    the words are, whether the template shows them as they are (it may leave out thoughts, or add empty ones), and what
    it makes of earlier turns.

    Args:
        render: messages -> text, with `add_generation_prompt=True` for a prompt.
        messages: normalized.
        text: all of them, rendered.
        closing: tokens that may close a turn.
        known: what this template was found to write around messages of a shape, for further ones: it is filled.

    Raises:
        ValueError: where a turn cannot be found; it is named.
    """
    free = (chr(code) for code in _PRIVATE if chr(code) not in text)
    marks = next(free), next(free)
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        return []
    found = _words_of_all(render, messages, text, spoken, marks[0], {} if known is None else known) or [
        (index, *_words_of_turn(render, messages, text, index, *marks)) for index in spoken
    ]
    last, _, _, at_the_end = found[-1]
    if last < len(messages) - 1:  # what closes the turn that is the last one
        _, _, at_the_end = _rendered_with(render, [*messages[:last]], messages[: last + 1], last, marks[0])
    tokens = re.compile("|".join(map(re.escape, sorted(closing, key=len, reverse=True))) or "(?!)")
    turns = []
    for _, start, end, after in found:
        length = _closing_length(after, at_the_end, tokens)
        turns.append(Turn(start, end + length, length > 0))
    return turns


def _closing_length(after: str, at_the_end: str, tokens: re.Pattern[str]) -> int:
    """How much of what the template writes behind the words closes the turn: the tokens that stand there in the middle
    as at the end of a conversation, otherwise the first."""
    alike = os.path.commonprefix([after, at_the_end])
    for where, most in ((alike, len(alike)), (after, 1)):
        end = 0
        for _ in range(most):
            token = tokens.match(where, len(where) - len(where[end:].lstrip()))
            if token is None:
                break
            end = token.end()
        if end:
            return end
    return 0


def _words_of_all(
    render: Callable[..., str],
    messages: Sequence[Message],
    text: str,
    spoken: Sequence[int],
    mark: str,
    known: dict[Any, Frame | None],
) -> list[tuple[int, int, int, str]] | None:
    """What :func:`_words_of_turn` says of each turn, from the frame for all of them: where the template shows all words
    as they are, and writes the same before them in every turn. `None` where it does not."""
    if any(message.keys() != {"role", "content"} for message in messages):
        return None
    shape = tuple((message["role"], _shape(message["content"])) for message in messages)
    if shape not in known:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[shape] = _frame(render, messages, spoken, mark)
    frame = known[shape]
    if frame is None:
        return None
    end, found, number = 0, [], 0
    for index, message in enumerate(messages):
        for words in _texts(message["content"]):
            start = end + len(frame.pieces[number])
            here = text.startswith(frame.pieces[number], end)
            behind = frame.pieces[number + 1]
            tries = (words, words.strip())
            end = next((start + len(w) for w in tries if text.startswith(w + behind, start)), -1) if here else -1
            if end < 0:
                return None
            if index in spoken:
                found.append((index, start - frame.own, end, text[end:]))
            number += 1
    return found if end + len(frame.pieces[number]) == len(text) else None


def _frame(render: Callable[..., str], messages: Sequence[Message], spoken: Sequence[int], mark: str) -> Frame | None:
    """What the template writes around the words of such messages, from two renderings; `None` where that does not show,
    or is not the same before each turn of the assistant."""
    counts = [len(_texts(message["content"])) for message in messages]
    if any(index == 0 or index - 1 in spoken or counts[index - 1] == 0 or counts[index] != 1 for index in spoken):
        return None
    others = [{"role": each["role"], "content": _with_words(each["content"], mark)} for each in messages]
    try:
        pieces = render(others).split(mark)
        headers = {pieces[sum(counts[:index])] for index in spoken} if len(pieces) == 1 + sum(counts) else set()
        if len(headers) != 1:
            return None
        prompt = render(others[: spoken[-1]], add_generation_prompt=True).rpartition(mark)[2]
    except TemplateError:
        return None
    (header,) = headers
    return Frame(pieces, len(header) - len(os.path.commonprefix([header, prompt])))


def _shape(content: str | Sequence[Message]) -> Any:
    return "text" if isinstance(content, str) else tuple(part.get("type") for part in content)


def _texts(content: str | Sequence[Message]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part.get("type") == "text"]


def _with_words(content: str | Sequence[Message], words: str) -> Any:
    """A content with other words in each of its texts."""
    if isinstance(content, str):
        return words
    return [{**part, "text": words} if part.get("type") == "text" else part for part in content]


def _words_of_turn(
    render: Callable[..., str], messages: Sequence[Message], text: str, index: int, words: str, before: str
) -> tuple[int, int, str]:
    """Where in the text the assistant begins and ends its words, and what comes behind them."""
    history = list(messages[:index])
    if history:
        history[-1] = _with_behind(history[-1], before)
    shown, found, after = _rendered_with(render, history, messages, index, words)
    history_text, behind, header = shown.rpartition(before)
    prompt = _generation_prompt(render, history, before, header)
    start = len(history_text) + len(os.path.commonprefix([header, prompt]))
    end = len(text) - len(after)
    shown = history_text + header
    alike = text.endswith(after) and text[:start] == shown[:start]
    if not found or (history and not behind) or start > end or not alike:
        raise ValueError(
            "the chat template does not show the assistant's words where it shows others in their place, so there is "
            f"nothing to supervise in turn {index}: {words_of(messages[index]['content'])[:80]!r}"
        )
    return start, end, after


def _with_behind(message: Message, mark: str) -> Message:
    """A message with a mark behind its words, before what a template would strip."""
    content = message["content"]
    if isinstance(content, str):
        words = content.rstrip()
        return {**message, "content": words + mark + content[len(words) :]}
    parts = list(content)
    words = parts.pop()["text"] if parts and parts[-1].get("type") == "text" else ""
    marked = words.rstrip() + mark + words[len(words.rstrip()) :]
    return {**message, "content": [*parts, {"type": "text", "text": marked}]}


def _rendered_with(
    render: Callable[..., str], history: list[Message], messages: Sequence[Message], index: int, words: str
) -> tuple[str, str, str]:
    """What is shown before other words of the assistant in one turn, they themselves, and what is shown behind them.

    The words stand alone, or, where the template wants that, beside what belongs to the turn, such as calls of tools.
    """
    bare = {"role": messages[index]["role"], "content": words}
    try:
        rendered = render([*history, bare, *messages[index + 1 :]])
    except TemplateError:
        rendered = render([*history, {**messages[index], "content": words}, *messages[index + 1 :]])
    return rendered.partition(words)


def _generation_prompt(render: Callable[..., str], history: list[Message], before: str, header: str) -> str:
    """What the template writes behind the history for the model to go on; where nothing comes before, what it writes
    before the words."""
    if not history:
        return header
    return render(history, add_generation_prompt=True).rpartition(before)[2]
