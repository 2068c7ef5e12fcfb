"""A check whether the model hub is reachable, before weights are downloaded.

The hub's client retries every file for about 25 seconds, with a warning each time. A machine
without network must instead fail in one line, or use cached files at once.
"""

import contextlib
from collections.abc import Iterator

_PROBE_SECONDS = 5.0


@contextlib.contextmanager
def cached_only_when_unreachable() -> Iterator[None]:
    """Make the hub's client use only its cache inside the block if the hub is unreachable."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=_PROBE_SECONDS)
    except Exception:  # the client's HTTP library differs between its versions
        return False
    return True
