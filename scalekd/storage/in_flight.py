"""Concurrent requests to a remote store, in threads of this process."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, ParamSpec, TypeVar

REQUESTS_IN_FLIGHT = 16
"""Threads of one process. Ten requests of 20 ms take about as long as decoding one batch (not
measured further)."""

Arguments = ParamSpec("Arguments")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_pools: dict[int, ThreadPoolExecutor] = {}


def submit(
    work: Callable[Arguments, Value], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Future[Value]:
    """Run ``work`` in a thread of this process's pool."""
    pool = _pools.get(os.getpid())
    if pool is None:  # a worker process has threads of its own
        _pools.clear()
        pool = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="in-flight")
        _pools[os.getpid()] = pool
    return pool.submit(work, *arguments, **options)


class Ahead(Generic[Key, Value]):
    """Values that are fetched in the background before they are needed.

    Args:
        fetch: Function that returns the value of a key.
        max_waiting: Number of prefetched values that are kept until they are taken; beyond it the
            oldest are dropped.
    """

    def __init__(self, fetch: Callable[[Key], Value], max_waiting: int) -> None:
        self._fetch = fetch
        self._max_waiting = max_waiting
        self._coming: OrderedDict[Key, Future[Value]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coming": OrderedDict()}

    def want(self, keys: Iterable[Key]) -> None:
        """Start fetching the values of keys that will be taken soon."""
        for key in keys:
            if key not in self._coming:
                self._coming[key] = submit(self._fetch, key)
        while len(self._coming) > self._max_waiting:
            _, given_up = self._coming.popitem(last=False)
            given_up.cancel()

    def take(self, key: Key) -> Value:
        """Return the value of a key; fetch it now unless :meth:`want` has started already.

        Raises:
            ScaleKDError: Fetching the value failed.
        """
        coming = self._coming.pop(key, None)
        return self._fetch(key) if coming is None else coming.result()

    def clear(self) -> None:
        """Cancel all pending fetches, and wait for those that have started."""
        coming, self._coming = list(self._coming.values()), OrderedDict()
        for future in coming:
            if not future.cancel():
                future.exception()
