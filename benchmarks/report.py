"""Write ``docs/benchmarks.md`` and its pictures from the committed results.

    python -m benchmarks.report

Each section is a function from the folder of results and the folder of pictures to Markdown, and
says how its figures were made. What has no results yet is left out, not guessed.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.accuracy.tables import accuracy_section
from benchmarks.gpu.tables import gpu_section
from benchmarks.speed.tables import speed_section

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
_DOCUMENT = _ROOT / "docs" / "benchmarks.md"
_IMAGES = _ROOT / "docs" / "img"

_HEAD = """\
# Measured

<!-- Made by `python -m benchmarks.report` from benchmarks/results; change those, not this. -->
"""

_SECTIONS: tuple[Callable[[Path, Path], str], ...] = (
    accuracy_section,
    speed_section,
    gpu_section,
)


def main() -> None:
    _IMAGES.mkdir(parents=True, exist_ok=True)
    sections = [section(_RESULTS, _IMAGES) for section in _SECTIONS]
    _DOCUMENT.write_text("\n".join([_HEAD, *(text for text in sections if text)]))


if __name__ == "__main__":
    main()
