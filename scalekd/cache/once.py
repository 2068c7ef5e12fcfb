"""Values shared by threads: the first thread makes a value, and the others wait for it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Once(Generic[Key, Value]):
    """A cache of values by key, each of which is made once.

    Args:
        max_kept: Number of values to keep, the most recently used ones; all when ``None``.
    """

    def __init__(self, max_kept: int | None = None) -> None:
        self._max_kept = max_kept
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, Future[Value]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key; call ``make`` unless the value exists or is being made.

        Raises:
            BaseException: The error of ``make``; the next call tries again.
        """
        with self._lock:
            future = self._values.get(key)
            is_first = future is None
            if future is None:
                future = self._values[key] = Future()
                if self._max_kept is not None and len(self._values) > self._max_kept:
                    self._values.popitem(last=False)
            else:
                self._values.move_to_end(key)
        if is_first:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    if self._values.get(key) is future:
                        del self._values[key]
                future.set_exception(error)
        return future.result()
