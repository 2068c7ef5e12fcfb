"""``scalekd cache push``."""

from scalekd.cli._share import share_command

command = share_command(
    "push",
    """Send a cache, or a part of it, to a folder, a bucket or a Hugging Face dataset.

    Only what is missing travels; files first, a shard's record after them, the manifest last. May
    be interrupted, run again, and run twice at once.
    """,
)
