"""Of several threads that need the same thing, one fetches it and the others wait."""

import threading
from collections.abc import Hashable

_NUM_LOCKS = 64  # of a kind; two keys on one lock wait for one another now and then, no more
_KINDS = ("record", "chunk", "metadata")


class Turns:
    """Locks by kind and key. Kinds are taken in the order of ``record``, ``chunk``, ``metadata``.

    A lock of one kind is held while one of a later kind is taken, never the other way round, so
    that no two threads wait for one another.
    """

    def __init__(self) -> None:
        self._locks = {kind: [threading.Lock() for _ in range(_NUM_LOCKS)] for kind in _KINDS}

    def of(self, kind: str, key: Hashable) -> threading.Lock:
        """The lock of one thing."""
        return self._locks[kind][hash(key) % _NUM_LOCKS]
