"""Notes of a pipeline: one line each, on standard error."""

import sys


def note(line: str) -> None:
    """Print what a person should know; it may quote names from documents."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"note: {shown}", file=sys.stderr, flush=True)
