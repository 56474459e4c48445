"""Options: defaults that several parts share, and names. What is misspelled is an error, and not stored beside what was
meant."""

import difflib
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Listener
from numbers import Integral, Real
from typing import Any

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)  # of SigLIP; also the grey of what no camera saw
MAX_TEXT_LENGTH = 1024  # text tokens of a training sample
DEFAULT_PROMPT = "Describe this panorama."


def check_number(name: str, value: Any, typical: float, least: float | None = None) -> int | float:
    """An option that is a finite number, as Python has it.

    Args:
        name: of the option, for the message.
        typical: a value that is usual, for the message.
        least: it must be at least this; more than 0 where nothing is given.

    Raises:
        ValueError: for what is none; the option, the value and what is allowed are named.
    """
    try:
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        is_number = False
    if not is_number:
        raise ValueError(f"{name} must be a finite number, got {value!r}. Typical value: {typical}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not (number > 0 if least is None else number >= least):
        raise ValueError(f"{name} must be {_at_least(least)}, got {value}. Typical value: {typical}")
    return number


def check_whole(name: str, value: Any, typical: int, least: int = 1) -> int:
    """An option that is a whole number, at least `least` (one like 2.0 is taken, too); see :func:`check_number`."""
    number = check_number(name, value, typical, least=-math.inf)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, got {value!r}. Typical value: {typical}")
    if number < least:
        allowed = _at_least(None if least == 1 else least)
        raise ValueError(f"{name} must be {allowed}, got {value}. Typical value: {typical}")
    return int(number)


def check_workers(name: str, count: int) -> None:
    """Whether so many data workers could hand over what they read. They do by sockets in the temporary folder; where
    its path is too long for one, each batch is dropped with a traceback, and who waits for it waits forever.

    Raises:
        ValueError: where there are workers, and they could not.
    """
    if not count or os.name != "posix":
        return
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise ValueError(
            f"{name} is {count}, but data workers could not hand over what they read, by sockets in "
            f"{tempfile.gettempdir()!r}: {error}. Set TMPDIR to a shorter path (75 bytes), or {name} to 0"
        ) from error


def _at_least(least: float | None) -> str:
    """What is allowed, in words."""
    return "positive" if least is None else f"at least {least}"


def check_flag(name: str, value: Any) -> bool:
    """An option that is true or false. Raises `ValueError` for what is neither."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def check_text(name: str, value: Any) -> str:
    """An option that is a text. Raises `ValueError` for what is none."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


def check_texts(name: str, values: Any) -> list[str]:
    """An option that is a list of texts, at least one. Raises `ValueError` for what is none."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a list of names, got {values!r}")
    if not values:
        raise ValueError(f"{name} must name at least one, got {list(values)}")
    return list(values)


def check_one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """An option that is one of some names. Raises `ValueError` for what is none of them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
    return value


def check_option_names(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Refuse options that do not exist.

    Args:
        given: names that somebody passed.
        known: names of the options, the most likely ones first: of two that fit equally the first is suggested.
        owner: what has the options, for the message.

    Raises:
        ValueError: for names that are not known; each with the option that was probably meant, or, where none is
            close, with all of them.
    """
    options = list(known)
    problems = []
    for name in given:
        if name in options:
            continue
        nearest = _nearest(name, options)
        hint = f"; its options are {', '.join(options)}" if nearest is None else f", did you mean {nearest!r}?"
        problems.append(f"unknown option {name!r} of {owner}{hint}")
    if problems:
        raise ValueError("\n".join(problems))


def check_resembling_names(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Refuse misspelled options among names that are for others too, such as arguments that one `from_pretrained` hands
    to several classes: what resembles no option passes.

    Args:
        given, known, owner: as in :func:`check_option_names`, which raises.
    """
    options = list(known)
    meant = [name for name in given if _nearest(name, options, cutoff=0.8) is not None]
    check_option_names(meant, options, owner)


def _nearest(name: str, options: Sequence[str], cutoff: float = 0.4) -> str | None:
    """The option that begins as `name` does, or holds it, or is spelled like it; `None` where none is."""
    if len(name) >= 3:  # fewer letters are part of nearly everything
        for option in options:
            if option.startswith(name) or name.startswith(option):
                return option
        for option in options:
            if name in option or option in name:
                return option
    return next(iter(difflib.get_close_matches(name, options, n=1, cutoff=cutoff)), None)
