"""The folder as a whole: nothing in it may go unchecked."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.conformance.conftest import GoldenFolder


def test_every_file_is_checked_by_a_module_of_its_kind(golden_folder: "GoldenFolder") -> None:
    assert golden_folder.path.is_dir(), f"no such folder: {golden_folder.path}"
    assert golden_folder.by_kind, f"no golden files in {golden_folder.path}"
    assert not golden_folder.unreadable

    modules = Path(__file__).parent.glob("test_*.py")
    checked = {
        line.split('"')[1]
        for module in modules
        for line in module.read_text().splitlines()
        if line.startswith("KIND = ")
    }
    unknown = {
        kind: [file.path.name for file in files]
        for kind, files in golden_folder.by_kind.items()
        if kind not in checked
    }
    assert not unknown, f"no test checks files of these kinds: {unknown}"
