"""Safe display of untrusted text on a terminal, in Markdown and in HTML.

Names, notes and error texts come from caches, run folders, file names and servers. Unchanged, they
could move a terminal's cursor, imitate another line of output, hide characters or fill the screen.
The functions here write invisible characters as escapes and limit the length.
"""

import datetime
import difflib
import html as _html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

MAX_LINE = 2000
"""Largest number of characters of one line of output; a longer one loses its middle."""
_UNITS = ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
_MOST_SECONDS = 1000 * 365 * 86_400
MAX_CELL = 200
"""Largest number of characters of one name, note or number in a table."""

# Default_Ignorable_Code_Point characters (zero-width) that Python calls printable.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_LINE_END = re.compile(r"\r\n|\r|\n")
# An underscore inside a word is not markup, and model names have many.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: object, *, limit: int = MAX_LINE) -> str:
    r"""Write text as one line that shows every character.

    Control characters, line breaks, escape sequences, directional and zero-width characters and
    lone surrogates become escapes such as ``\x1b`` and ``\u202e``. Text that is too long loses
    its middle.

    Args:
        text: An object; its ``str`` is written.
        limit: Largest number of characters of the result.
    """
    line = _cut(str(text), limit)
    if not (line.isascii() and line.isprintable()):
        line = _cut("".join(map(_shown, line)), limit)
    return line


def one_line(text: object, *, limit: int = MAX_LINE) -> str:
    """Write text of several lines as one: runs of white space become single spaces."""
    return printable(" ".join(str(text).split()), limit=limit)


def first_line(error: BaseException, *, limit: int = 300) -> str:
    """Return the first line of an error's text, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``; did you mean 'x'?`` for the known name nearest to a wrong one, or no text.

    Args:
        name: The name that is not known.
        known: The names that are.
        cutoff: Least similarity of a name that is suggested, in 0..1.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def markdown(text: object, *, limit: int = MAX_LINE) -> str:
    """Write text as plain Markdown: escape markup, HTML and the separator of table cells."""
    return _MARKDOWN.sub(r"\\\g<0>", _html.escape(one_line(text, limit=limit), quote=False))


def markdown_code(text: object, *, limit: int = MAX_LINE) -> str:
    """Write text as a Markdown code span that is also valid in a table cell."""
    line = one_line(text, limit=limit)
    ticks = markdown_fence(line, shortest=1)
    space = " " if "`" in line or not line else ""
    return f"{ticks}{space}{line}{space}{ticks}".replace("|", r"\|")


def markdown_fence(text: str, *, shortest: int = 3) -> str:
    """Return a run of backticks that does not occur in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


def html(text: object, *, limit: int = MAX_LINE) -> str:
    """Write text for an HTML element or a quoted attribute."""
    return _html.escape(printable(text, limit=limit))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns; the middle of an overlong cell is left out."""
    cells = [[printable(cell, limit=MAX_CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def split_lines(text: str) -> list[str]:
    """Split at line ends alone; ``str.splitlines`` also divides at characters of a line."""
    lines = _LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def counted(number: int, noun: str) -> str:
    """Format a number with its noun, such as ``1 pass`` and ``1,000 samples``."""
    if number != 1:
        noun += "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}"


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes, such as ``1.9 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def format_cache_size(total: float, fixed: float, per_view: float) -> str:
    """Describe the bytes of a cache: what it has once, and what a view adds."""
    return (
        f"{format_bytes(total)}: {format_bytes(fixed)} of tail, witnesses and tables, and"
        f" {format_bytes(per_view)} per view"
    )


def format_duration(seconds: float) -> str:
    """Format a duration by its two largest units, such as ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for size, unit, smaller_size, smaller in _UNITS:
        if whole >= size:
            count, rest = divmod(whole, size)
            rest //= smaller_size
            return f"{count:,} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def format_time_left(seconds: float) -> str:
    """Format the time left and the time of day when it ends, with the date from a day on."""
    if not math.isfinite(seconds) or seconds > _MOST_SECONDS:
        return "no end in sight"
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    when = end.strftime("%H:%M" if seconds < 86_400 else "%d %b %H:%M")
    return f"{format_duration(seconds)} left, until {when}"


def _shown(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return " "
    if character.isprintable() and not _IGNORABLE.match(character):
        return character
    return character.encode("unicode_escape").decode()


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = limit // 3  # keep the end: errors end with what to do
    return f"{text[: limit - tail - 1]}…{text[len(text) - tail :]}"
