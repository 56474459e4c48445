"""The field's own data sets, one small adapter each: what a row of them asks, and what is right.

An adapter takes the fields of a row and gives its questions, or `Dropped` for one that is none. To add a data set,
write one, and an entry in `FORMATS`: how its rows are known, and what is to be done when all are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..data.files import names_in_url
from ..data.rows import messages_of
from ..places_panorama import write_places
from .fields import (
    Dropped,
    Files,
    bbox_place,
    bfov,
    clean,
    image_size,
    interval,
    label,
    looks_like_places,
    needed,
    number,
    options,
    place,
    places,
    plain,
    question,
    right_key,
    shown,
    text,
    texts,
    unpacked,
)
from .items import Item

Found = Iterator[Item | Dropped]
_IMAGES = ("image", "images", "file_name", "image_path", "image_file", "panorama")
_QUESTIONS = ("query", "question", "prompt", "instruction")  # as the trainer knows them
_ANSWERS = ("annotation", "answer", "response")
_DRAWN = ("A", "B", "C", "D", "E", "F", "G", "H")  # columns of options


@dataclass
class Row:
    """A row as it was read.

    Attributes:
        number: of the line of a text file, of the row of a table (from 1), of the turn of a conversation.
        fields: its values; empty where it cannot be read.
        reason: why it cannot be read.
        file: that it stands in, where a data set has several.
    """

    number: int
    fields: dict[str, Any]
    reason: str | None = None
    file: str | None = None

    @property
    def id(self) -> str:
        """Names a row that has no id of its own."""
        return f"{self.file}:{self.number}" if self.file else f"row-{self.number}"


def _item(row: Row, files: Files, image: str | bytes, asked: str, **about: Any) -> Item:
    """An item with what follows from the rest."""
    about.setdefault("id", text(row.fields, "item_id", "question_id", "id", "index") or row.id)
    item = Item(image=image, question=asked, panorama=files.name(image), **about)
    item.group = item.group or item.kind
    return item


def _image(row: Row, files: Files) -> str | bytes:
    return files.find(next((row.fields[name] for name in _IMAGES if row.fields.get(name)), None))


def _choice(among: list[tuple[str, str]], answer: str) -> dict[str, Any]:
    """Options, the right one's key, and its text as the reference."""
    key = right_key(answer, among)
    return {"options": among, "key": key, "references": [dict(among)[key]]}


def _panospace(row: Row, files: Files) -> Found:
    fields = row.fields
    image, asked = _image(row, files), question(fields)
    about: dict[str, Any] = {
        "id": needed(fields, "item_id"),
        "kind": needed(fields, "task_id"),
        "group": text(fields, "ability_group") or "",
        "more": plain(fields, "diagnostic_slices"),
    }
    among, answer = options(fields.get("options")), fields.get("answer")
    if among:
        about.update(_choice(among, needed(fields, "answer")))
    elif looks_like_places(answer):
        about["places"] = places(answer, "answer")
        about["references"] = [text(fields, "answer_text") or write_places(about["places"])]
    else:
        about["references"] = [needed(fields, "answer", "answer_text")]
        if (words := text(fields, "answer_text")) and words not in about["references"]:
            about["references"].append(words)
    yield _item(row, files, image, asked, **about)


def _osr(row: Row, files: Files) -> Found:
    answer = row.fields.get("answer")
    if isinstance(answer, dict) and answer:  # a cognitive map
        answer = json.dumps(answer, allow_nan=False)
    reference = needed({"answer": answer}, "answer")
    kind = label(row.fields, "skills_tested") or "answer"
    more = plain(row.fields, "turn_id")
    image, asked = _image(row, files), question(row.fields)
    yield _item(row, files, image, asked, references=[reference], id=row.id, kind=kind, more=more)


def _bench360(row: Row, files: Files) -> Found:
    fields = row.fields
    index = needed(fields, "index", "No.")
    stored = next((fields[name] for name in _IMAGES if fields.get(name)), None)
    image, asked = files.find_or_decode(stored, index), question(fields)
    among = options(fields.get("multi-choice options") or fields.get("options"))
    drawn = [(letter, words) for letter in _DRAWN if (words := text(fields, letter)) is not None]
    among = among or drawn
    answer = needed(fields, "answer")
    about: dict[str, Any] = _choice(among, answer) if among else {"references": [answer]}
    more = plain(fields, "category", "l2-category")
    boxes = unpacked(fields.get("bbox_2d") or fields.get("bbox"))
    if boxes:
        found, names = _boxes(boxes, image_size(image))
        if among:  # what the answer is read from; the question is not about places
            more.update({"places": found, "labels": names})
        else:
            about["places"] = found
    rotation = text(fields, "rotation")
    if rotation is not None:
        more["rotation"] = int(number(rotation, "rotation"))
        index = f"{index}-r{more['rotation']}"
    kind = text(fields, "l2-category", "category") or "answer"
    group = text(fields, "category") or ""
    yield _item(row, files, image, asked, id=index, kind=kind, group=group, more=more, **about)


def _boxes(boxes: Any, size: tuple[int, int]) -> tuple[list[Any], list[str]]:
    """The places of one box, of a list of boxes, or of a list of {"bbox_2d", "label"}."""
    several = isinstance(boxes, list) and boxes and all(isinstance(each, dict | list) for each in boxes)
    found, names = [], []
    for each in boxes if several else [boxes]:
        named = each if isinstance(each, dict) else {"bbox_2d": each}
        found.append(bbox_place(named.get("bbox_2d"), size))
        names.append(text(named, "label") or "")
    return found, names


def rotate_options(item: Item) -> list[Item]:
    """The question once for each place that the right option can have (circular evaluation).

    Args:
        item: with options.

    Returns:
        As many items as options; in the one of `more["rotation"]` r the texts have moved r places on, the keys stay.
        `more["rotation_group"]` ties them together: only who has all of them right knows the answer.

    Raises:
        ValueError: for a question without options.
    """
    if not item.options or item.key is None:
        raise ValueError(f"the question {item.id!r} has no options to rotate")
    keys, texts = zip(*item.options, strict=True)
    right = keys.index(item.key)
    count = len(keys)
    return [
        replace(
            item,
            id=f"{item.id}-r{turn}",
            options=[(keys[place], texts[(place - turn) % count]) for place in range(count)],
            key=keys[(right + turn) % count],
            more={**item.more, "rotation": turn, "rotation_group": item.more.get("rotation_group", item.id)},
        )
        for turn in range(count)
    ]


def _tie_rotations(items: list[Item]) -> list[Item]:
    """Rows that ask the same with the same options in other orders, tied together: `more["rotation"]` says by how
    many places the right option has moved on from the first of them. A row in an order that was there begins anew."""
    groups: dict[Any, tuple[str, int, set[int]]] = {}
    for item in items:
        if not item.options:
            continue
        keys, texts = zip(*item.options, strict=True)
        right = keys.index(item.key)
        same = (item.panorama, item.question, tuple(sorted(texts)), texts[right])
        name, first, seen = groups.get(same, (item.id, right, set()))
        rotation = item.more.get("rotation", (right - first) % len(keys))
        if rotation in seen:
            name, first, seen = item.id, right, set()
            rotation = item.more.get("rotation", 0)
        groups[same] = (name, first, seen | {rotation})
        item.more.update({"rotation": rotation, "rotation_group": name})
    return items


def _panoenv(row: Row, files: Files) -> Found:
    fields = row.fields
    asked = fields
    if turns := _turns(fields):
        asked = {"question": next((turn.get("value") for turn in turns if turn.get("from") in ("human", "user")), None)}
    reference = needed(fields, "expected_answer")
    kind = needed(fields, "question_type")
    more = plain(fields, "accu_reward_method")
    yield _item(row, files, _image(row, files), question(asked), references=[reference], kind=kind, more=more)


def _omnicot(row: Row, files: Files) -> Found:
    fields = row.fields
    answer = needed(fields, "answer")
    among = options(fields.get("options"))
    about: dict[str, Any] = _choice(among, answer) if among else {"references": [answer]}
    about.update(kind=label(fields, "subtype", "type") or "answer", group=label(fields, "type"))
    about["more"] = plain(fields, "cot")
    yield _item(row, files, _image(row, files), question(fields), **about)


def _hbench(row: Row, files: Files) -> Found:
    """Right is a direction inside both intervals. The yaw interval goes to the right from low to high, so that it
    crosses the seam where low > high. Without a pitch any is right (the search for a path)."""
    fields = row.fields
    asked = question(fields, "question", "task", "instruction", "query")
    yaw, pitch = (
        next((fields[name] for name in (f"target_{what}", what) if fields.get(name) is not None), None)
        for what in ("yaw", "pitch")
    )
    low, high = interval(yaw, "target_yaw")
    bottom, top = (-90.0, 90.0) if pitch is None else interval(pitch, "target_pitch")
    across = high - low if high - low == 360 else (high - low) % 360
    if abs(high - low) > 360 or not -90 <= bottom <= top <= 90:
        raise Dropped(f"no intervals of directions: yaw {shown(yaw)}, pitch {shown(pitch)}")
    target = bfov([low + across / 2, (bottom + top) / 2, max(across, 1.0), max(top - bottom, 1.0)])
    more = {"target_yaw": [low, high], "target_pitch": [bottom, top], **plain(fields, "level", "initial yaw")}
    kind = label(fields, "type", "category") or ("path" if pitch is None else "object")
    image = _image(row, files)
    references = [write_places([target])]
    yield _item(row, files, image, asked, references=references, kind=kind, places=[target], more=more)


def _eagle(row: Row, files: Files) -> Found:
    """Azimuth and elevation as yaw and pitch: to the right from the middle of the image, and up."""
    fields = row.fields
    centre = [number(fields.get(name), name) for name in ("azimuth_degrees", "elevation_degrees")]
    extents = []
    for across, extent in (("width", "azimuth"), ("height", "elevation")):
        names = (f"bbox_{across}_degrees", f"bbox_{extent}_extent_degrees")
        value = next((fields[name] for name in names if fields.get(name) not in (None, "")), None)
        if value is None:
            raise Dropped(f"no {' or '.join(names)}")
        extents.append(number(value, names[0]))
    target = bfov([*centre, *extents])
    if text(fields, *_QUESTIONS) is None:
        asked = f"Where is the {needed(fields, 'label', 'object', 'question')}?"
    else:
        asked = question(fields)
    kind = label(fields, "kind", "type", "category") or "place"
    references = [write_places([target])]
    yield _item(row, files, _image(row, files), asked, references=references, kind=kind, places=[target])


def _quic360(row: Row, files: Files) -> Found:
    fields = row.fields
    image = _named_by_url(needed(fields, "url"), files)
    asked = question(fields, "query")
    references, more = texts(fields, "annotation"), {"url": needed(fields, "url")}
    if not references:
        raise Dropped("no annotation")
    yield _item(row, files, image, asked, references=references, id=row.id, kind="caption", more=more)


def _named_by_url(url: str, files: Files) -> str | bytes:
    """The file that has the name which ends a URL, as it stands there or decoded."""
    try:
        names = names_in_url(url)
    except ValueError:
        raise Dropped(f"url is no address: {shown(url)}") from None
    first = None
    for name in names:
        try:
            return files.find(clean(name, "the file's name in url"))
        except Dropped as error:
            first = first or error
    raise first or Dropped(f"url names no file: {shown(url)}")


def _group_references(items: list[Item]) -> list[Item]:
    """One question for all references of an address and a query."""
    grouped: dict[tuple[str, str], Item] = {}
    for item in items:
        first = grouped.setdefault((item.more["url"], item.question), item)
        if first is not item:
            first.references += item.references
    return list(grouped.values())


def _turns(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row's conversation; empty where it has none."""
    named = [name for name in ("conversations", "messages") if fields.get(name)]
    turns = unpacked(fields[named[0]]) if named else []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Dropped(f"a conversation must be a list of turns, got {shown(turns)}")
    return turns


def _panorama(row: Row, files: Files) -> Found:
    """Our own: each question of a conversation by itself, without the turns before it."""
    fields = row.fields
    image = _image(row, files)
    if turns := _turns(fields):
        asked = _questions(turns, messages_of(turns, [image]))
    else:
        asked = [{"question": question(fields, *_QUESTIONS), "answer": texts(fields, *_ANSWERS)}]
    for which, said in enumerate(asked):
        if len(asked) == 1:
            said.update(_named(fields, ("place", "places", "options", "key")))
        said.update({**_named(fields, ("kind",)), **_named(said, ("kind",))})  # the question's own wins
        if turns:
            said.update(_listed(fields, which, len(asked)))
    name = text(fields, "item_id", "question_id", "id") or row.id
    for which, said in enumerate(asked, 1):
        try:
            yield _item(row, files, image, id=name if len(asked) == 1 else f"{name}.{which}", **_told(said))
        except Dropped as error:
            yield Dropped(str(error) if len(asked) == 1 else f"question {which}: {error}")


def _named(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: fields[name] for name in names if fields.get(name) not in (None, "")}


def _questions(turns: list[dict[str, Any]], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a conversation says of each of its questions: the words, the answer, and what its turns name besides."""
    asked: list[dict[str, Any]] = []
    for turn, message in zip(turns, messages, strict=True):
        words = "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
        besides = _named(turn, ("kind", "place", "places", "options", "key"))
        if message["role"] == "user":
            asked.append({"question": words, **besides})
        elif message["role"] == "assistant":
            if "answer" in asked[-1]:
                raise Dropped("an answer follows another answer")
            asked[-1].update(besides, answer=words)
    if not asked:
        raise Dropped("no question")
    return asked


_LISTS = (  # of a row, with an entry for each question -> what it says of one
    *(("questions", "question"), ("kinds", "kind"), ("places", "places")),
    *(("options", "options"), ("keys", "key"), ("turns", "turns")),
)


def _listed(fields: dict[str, Any], which: int, count: int) -> dict[str, Any]:
    """What a row's lists, with an entry for each question, say of one."""
    said = {}
    for name, what in _LISTS:
        values = unpacked(fields.get(name))
        if values is None or values == "":
            continue
        if count == 1 and name in ("places", "options") and isinstance(values, list) and len(values) != 1:
            continue  # of the row's only question
        if not isinstance(values, list) or len(values) != count:
            raise Dropped(f"{name} must be a list with an entry for each of {count} questions, got {shown(values)}")
        said[what] = values[which]
    return said


def _told(said: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an item that follow from what is said of its question."""
    answers, key, among = texts(said, "answer"), text(said, "key"), options(said.get("options"))
    about: dict[str, Any] = {"asked": question(said, "question"), "kind": text(said, "kind") or "answer"}
    if said.get("place") is not None:
        about["places"] = [place(said["place"])]
    elif said.get("places") not in (None, ""):
        about["places"] = places(said["places"])
    if (turning := text(said, "turns")) is not None:
        about["more"] = {"turns": turning}
    if key is not None and not among:
        raise Dropped(f"the key {shown(key)} has no options")
    right = answers if key is None else [key]
    if not right and about.get("places") is None:
        raise Dropped("no answer")
    right = right or [write_places(about["places"])]
    if among and len({right_key(each, among) for each in right}) > 1:
        raise Dropped(f"the answers {shown(right)} are several of the options")
    return {**about, **(_choice(among, right[0]) if among else {"references": right})}


@dataclass
class Format:
    """How a data set is read.

    Attributes:
        adapter: of a row.
        known_by: sets of fields; rows that have all of one are of this data set.
        finish: what is done with all of its questions; these are read to the end, whatever the limit.
        same: what no two questions may share.
    """

    adapter: Callable[[Row, Files], Found]
    known_by: list[set[str]]
    finish: Callable[[list[Item]], list[Item]] | None = None
    same: Callable[[Item], Any] = lambda item: item.id

    def fits(self, fields: dict[str, Any]) -> bool:
        """Whether a row has the fields by which the format is known."""
        return any(known <= fields.keys() for known in self.known_by)


FORMATS = {  # the first one that fits wins
    "panospace": Format(_panospace, [{"item_id", "task_id"}]),
    "osr": Format(  # a scene has the same questions in several files
        _osr, [{"skills_tested", "question", "answer"}], same=lambda item: (item.panorama, item.question)
    ),
    "hbench": Format(_hbench, [{"target_yaw"}, {"task", "yaw"}]),
    "eagle": Format(_eagle, [{"azimuth_degrees", "elevation_degrees"}]),
    "panoenv": Format(_panoenv, [{"question_type", "expected_answer"}]),
    "quic360": Format(_quic360, [{"url", "query", "annotation"}], _group_references),
    "360bench": Format(
        _bench360,
        [{"index", "question", "answer", "A", "B"}, {"index", "question", "answer", "multi-choice options"}],
        _tie_rotations,
    ),
    "omnicot": Format(
        _omnicot,
        [{"file_name", "question", "answer", "cot"}, {"file_name", "question", "answer", "type", "subtype"}],
    ),
    "panorama": Format(
        _panorama,
        [
            {image, *asked}
            for image in _IMAGES
            for asked in (
                *(("conversations",), ("messages",)),
                *((words, answer) for words in _QUESTIONS for answer in _ANSWERS),
            )
        ],
    ),
}


def format_of(rows: list[Row]) -> str | None:
    """The format that most of the rows have the fields of."""
    fits = [next((name for name, each in FORMATS.items() if each.fits(row.fields)), None) for row in rows]
    found = Counter(name for name in fits if name is not None).most_common(1)
    return found[0][0] if found else None
