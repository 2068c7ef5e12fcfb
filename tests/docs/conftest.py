"""Documents' programs and commands, and a folder that holds what they name."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def programs() -> Callable[[str, str], dict[str, str]]:
    """Reads a document's fenced blocks of one language, by the name in the comment above each."""

    def read(document: str, language: str) -> dict[str, str]:
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        fence = rf"(?:<!-- program: (?P<name>[\w-]+) -->\n)?```{language}\n(?P<code>.*?)^```$"
        found: dict[str, str] = {}
        for match in re.finditer(fence, text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            assert match["name"], f"{document}:{line}: a block without a name is not tested"
            assert match["name"] not in found, f"{document}:{line}: {match['name']} stands twice"
            found[match["name"]] = match["code"]
        return found

    return read


@pytest.fixture(scope="session")
def working_folder(
    sound_cache: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Path]:
    """Makes a folder with ``imagenet``, 70 tiny images, and ``swin_l-cache`` of a tiny teacher."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("working")
        (folder / "swin_l-cache").symlink_to(sound_cache)
        (folder / "imagenet").symlink_to(tiny_images)
        return folder

    return make
