"""Requests to a remote store, several under way at once, in threads of this process."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, ParamSpec, TypeVar

REQUESTS_IN_FLIGHT = 16
"""A process. Ten requests of 20 ms each hide behind one batch of decoding (not studied)."""

Arguments = ParamSpec("Arguments")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_pools: dict[int, ThreadPoolExecutor] = {}


def submit(
    work: Callable[Arguments, Value], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Future[Value]:
    """Run ``work`` in one of this process's threads."""
    pool = _pools.get(os.getpid())
    if pool is None:  # a worker process has threads of its own
        _pools.clear()
        pool = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="in-flight")
        _pools[os.getpid()] = pool
    return pool.submit(work, *arguments, **options)


class Ahead(Generic[Key, Value]):
    """Values that are on their way before they are asked for.

    Args:
        fetch: Gives the value of a key.
        max_waiting: Values kept that nobody has asked for yet; the oldest are given up.
    """

    def __init__(self, fetch: Callable[[Key], Value], max_waiting: int) -> None:
        self._fetch = fetch
        self._max_waiting = max_waiting
        self._coming: OrderedDict[Key, Future[Value]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coming": OrderedDict()}

    def want(self, keys: Iterable[Key]) -> None:
        """Begin to fetch what is going to be asked for."""
        for key in keys:
            if key not in self._coming:
                self._coming[key] = submit(self._fetch, key)
        while len(self._coming) > self._max_waiting:
            _, given_up = self._coming.popitem(last=False)
            given_up.cancel()

    def take(self, key: Key) -> Value:
        """The value of a key, fetched now if nobody wanted it before.

        Raises:
            ScaleKDError: What fetching it met.
        """
        coming = self._coming.pop(key, None)
        return self._fetch(key) if coming is None else coming.result()

    def clear(self) -> None:
        """Give up all that is on its way, and wait for what cannot be given up."""
        coming, self._coming = list(self._coming.values()), OrderedDict()
        for future in coming:
            if not future.cancel():
                future.exception()
