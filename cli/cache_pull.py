"""``scalekd cache pull``."""

from scalekd.cli._share import share_command

command = share_command(
    "pull",
    """Fetch a cache, or a part of it; a later pull can extend the part.

    Every file is checked after it is written. The command may be interrupted, repeated, and run
    twice at the same time. While a cache is still being written, its committed shards are fetched.
    """,
)
