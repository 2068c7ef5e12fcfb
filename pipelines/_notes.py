"""Notes of a pipeline, one line each, on standard error."""

import sys

from scalekd.text import printable


def note(line: str) -> None:
    """Print what a person should know; it may quote names from documents."""
    print(f"note: {printable(line)}", file=sys.stderr, flush=True)
