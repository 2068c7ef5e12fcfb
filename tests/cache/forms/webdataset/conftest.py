"""The sound cache as tars."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sound_tars(make_tars: Callable[[str], Path]) -> Path:
    """The sound cache as tars with the encoded images. Read only."""
    return make_tars("source")
