"""Bad samples: counted, listed, and too many of them end a run."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class TooManyBadSamples(RuntimeError):
    """More samples than allowed could not be used."""


class SkippedSamples:
    """Counts and lists bad samples.

    Args:
        path: `skipped.jsonl`, to which records are appended.
        max_share: bad samples among all, above which the run fails, in [0, 1].
        minimum: samples seen before it may fail.
        write: whether this process writes; all of them should count, so that all of them stop.
    """

    def __init__(self, path: str | os.PathLike[str], max_share: float = 0.1, minimum: int = 20, write: bool = True):
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must be in [0, 1], got {max_share}. Typical value: 0.1")
        self.path, self.max_share, self.minimum, self.write = Path(path), max_share, minimum, write
        self.bad = self.seen = 0
        self.kinds: Counter[str] = Counter()

    def add(self, records: Sequence[dict[str, Any]], seen: int) -> None:
        """Take in the records of a step, of all processes, with the number of good and bad samples in it.

        Raises:
            TooManyBadSamples: when the share of bad samples is above `max_share`.
        """
        known = set(self.kinds)
        self._count(records, seen)
        if self.write:
            for record in records:
                if (kind := record["reason"].split(":")[0]) not in known:
                    known.add(kind)
                    logger.warning("A sample is left out, as others like it will be: %s", record["reason"])
        if records and self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        if self.seen >= self.minimum and self.bad > self.max_share * self.seen:
            common = "; ".join(f"{kind} ({count})" for kind, count in self.kinds.most_common(3))
            raise TooManyBadSamples(
                f"{self.bad} of {self.seen} samples could not be used, more than the allowed share of "
                f"{self.max_share:g}. Commonest reasons: {common}. Each is listed in {str(self.path)!r}; "
                "mend the data or allow a larger share"
            )

    def summary(self) -> str:
        """How many samples were left out, why, and where they are listed; nothing where none was."""
        if not self.bad:
            return ""
        kinds = "; ".join(f"{kind} ({count})" for kind, count in self.kinds.most_common())
        return f"{self.bad} of {self.seen} samples could not be used: {kinds}. Each is listed in {str(self.path)!r}"

    def rewind(self, step: int, seen: int = 0) -> None:
        """Forget the records from this step on, when a run goes on from there.

        Args:
            step: the first one that is made again.
            seen: samples before it (`BatchStream.seen_before`); with 0 the counting starts anew.
        """
        self.bad = self.seen = 0
        self.kinds.clear()
        unfinished = self.path.with_suffix(".tmp")
        with ExitStack() as files:
            written = files.enter_context(unfinished.open("w", encoding="utf-8")) if self._rewrites else None
            for line in files.enter_context(self.path.open(encoding="utf-8")) if self.path.is_file() else ():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # cut off when the run was killed
                    continue
                if record["step"] < step:
                    self._count([record] if seen else [], 0)
                    if written is not None:
                        written.write(json.dumps(record) + "\n")
        self._count([], seen)
        if self._rewrites:
            os.replace(unfinished, self.path)

    @property
    def _rewrites(self) -> bool:
        return self.write and self.path.is_file()

    def _count(self, records: Sequence[dict[str, Any]], seen: int) -> None:
        self.bad += len(records)
        self.seen += seen
        self.kinds.update(record["reason"].split(":")[0] for record in records)
