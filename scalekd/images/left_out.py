"""Entries of an image set that are not taken: counted by reason, the first of each named."""

import itertools
from collections import Counter
from collections.abc import Iterable

from scalekd.text import printable

_MAX_NAME = 120


class LeftOut:
    """Entries that were not taken.

    A reason is a plural noun phrase, such as ``hidden files``; it starts the entry of the line.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count ``name``, and ``count - 1`` others of its kind."""
        self._counts[reason] += count
        self._first.setdefault(reason, name)

    def extend(self, other: "LeftOut") -> None:
        """Add all that another has counted."""
        for reason, count in other._counts.items():
            self.add(reason, other._first[reason], count)

    def __len__(self) -> int:
        return self._counts.total()

    def lines(self, place: str) -> tuple[str, ...]:
        """One line, or none where everything was taken."""
        if not self._counts:
            return ()
        kinds = (
            f"{count:,} {reason} (first: {shown(self._first[reason])})"
            for reason, count in self._counts.items()
        )
        return (f"{printable(place)}: left out {'; '.join(kinds)}",)


def shown(name: str) -> str:
    """A name in quotation marks for messages: printable and bounded."""
    return f"'{printable(name, limit=_MAX_NAME)}'"


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first few of some names, for messages."""
    first = [printable(name, limit=_MAX_NAME) for name in itertools.islice(names, limit + 1)]
    return ", ".join(first[:limit]) + (", …" if len(first) > limit else "")
