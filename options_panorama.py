"""Options: defaults that several parts share, and names. What is misspelled is an error, and not stored beside what was
meant."""

import difflib
from collections.abc import Iterable, Sequence

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)  # of SigLIP; also the grey of what no camera saw
MAX_TEXT_LENGTH = 1024  # text tokens of a training sample
DEFAULT_PROMPT = "Describe this panorama."


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
