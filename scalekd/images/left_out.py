"""Entries of an image set that are left out: their number and first name for each reason."""

import itertools
from collections import Counter
from collections.abc import Iterable

from scalekd.text import printable

_MAX_NAME = 120


class LeftOut:
    """Counts entries that were left out.

    A reason is a plural noun phrase, such as ``hidden files``.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count ``name`` and ``count - 1`` other entries with the same reason."""
        self._counts[reason] += count
        self._first.setdefault(reason, name)

    def extend(self, other: "LeftOut") -> None:
        """Add the counts of another instance."""
        for reason, count in other._counts.items():
            self.add(reason, other._first[reason], count)

    def __len__(self) -> int:
        return self._counts.total()

    @property
    def summary(self) -> str:
        """Number and first name of each reason, without the location."""
        kinds = (
            f"{count:,} {reason} (first: {shown(self._first[reason])})"
            for reason, count in self._counts.items()
        )
        return f"left out {'; '.join(kinds)}"

    def lines(self, location: str) -> tuple[str, ...]:
        """Return one line, or no line if nothing was left out."""
        return (f"{printable(location)}: {self.summary}",) if self._counts else ()


def shown(name: str) -> str:
    """Return a name in quotation marks for messages: printable and bounded."""
    return f"'{printable(name, limit=_MAX_NAME)}'"


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Return the first few of some names, for messages."""
    first = [printable(name, limit=_MAX_NAME) for name in itertools.islice(names, limit + 1)]
    return ", ".join(first[:limit]) + (", …" if len(first) > limit else "")
