"""Concurrent requests to remote stores, in threads of this process."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, ParamSpec, TypeVar

REQUESTS_IN_FLIGHT = 16
"""Threads of one process. Ten requests of 20 ms take about as long as decoding one batch; other
numbers were not measured."""

Arguments = ParamSpec("Arguments")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_pools: dict[int, ThreadPoolExecutor] = {}


def submit(
    work: Callable[Arguments, Value], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Future[Value]:
    """Run ``work`` in a thread of this process's pool."""
    pool = _pools.get(os.getpid())
    if pool is None:  # a forked process needs its own threads
        _pools.clear()
        pool = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="in-flight")
        _pools[os.getpid()] = pool
    return pool.submit(work, *arguments, **options)


class Prefetcher(Generic[Key, Value]):
    """Fetches values in the background before they are needed.

    Args:
        fetch: Function that returns the value of a key.
        max_pending: Largest number of values that were requested and not taken; beyond it the
            oldest are dropped.
    """

    def __init__(self, fetch: Callable[[Key], Value], max_pending: int) -> None:
        self._fetch = fetch
        self._max_pending = max_pending
        self._pending: OrderedDict[Key, Future[Value]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": OrderedDict()}

    def request(self, keys: Iterable[Key]) -> None:
        """Start fetching the values of keys that will be taken soon."""
        for key in keys:
            if key not in self._pending:
                self._pending[key] = submit(self._fetch, key)
        while len(self._pending) > self._max_pending:
            _, oldest = self._pending.popitem(last=False)
            oldest.cancel()

    def take(self, key: Key) -> Value:
        """Return the value of a key; fetch it now unless :meth:`request` has started already.

        Raises:
            ScaleKDError: Fetching the value failed.
        """
        future = self._pending.pop(key, None)
        return self._fetch(key) if future is None else future.result()

    def clear(self) -> None:
        """Cancel all pending fetches, and wait for those that have started."""
        pending, self._pending = self._pending, OrderedDict()
        for future in pending.values():
            if not future.cancel():
                future.exception()
