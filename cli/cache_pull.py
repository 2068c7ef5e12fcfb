"""``scalekd cache pull``."""

from scalekd.cli._share import share_command

command = share_command(
    "pull",
    """Fetch a cache, or a part of it: a later pull widens the part.

    Every file is checked when it arrives. May be interrupted, run again, run twice at once, and
    run while the cache is still being written: what is committed comes now.
    """,
)
