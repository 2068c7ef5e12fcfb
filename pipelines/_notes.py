"""Print notes of a pipeline, one line each, on standard error."""

import os
import sys

from scalekd.text import printable


def note(*lines: str) -> None:
    """Print notes for the user in the main process; control characters are escaped."""
    for line in lines if is_main_process() else ():
        print(f"note: {printable(line)}", file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Return whether this is the only process, or the first that a launcher started."""
    return "LOCAL_RANK" not in os.environ or int(os.environ.get("RANK", "0")) == 0
