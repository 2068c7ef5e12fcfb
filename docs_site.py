"""Hooks of MkDocs: the command line's reference page, and links out of the documents.

The site has no copy of the repository, so a link to a file outside ``docs`` becomes its path.
"""

import re
from typing import Any

from mkdocs.structure.files import File, Files

from scalekd.cli._reference import reference

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the page of all commands."""
    files.append(File.generated(config, "command-line.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files outside the documents by their paths in the repository."""
    return _OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
