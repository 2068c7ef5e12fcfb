"""``scalekd cache push``."""

from scalekd.cli._share import share_command

command = share_command(
    "push",
    """Send a cache, or a part of it, to a folder, a bucket or a Hugging Face dataset.

    Only missing files are sent: first the files of a shard, then its record, and last the manifest.
    The command may be interrupted, repeated, and run twice at the same time.
    """,
)
