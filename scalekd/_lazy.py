"""Packages whose names are imported when they are first used.

A command's options are made from records that lie beside code for torch; its help must not load
torch. Type checkers read the package's imports, which are under ``if TYPE_CHECKING``.
"""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy(package: str, file: str) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package from the imports under its ``if TYPE_CHECKING``."""

    @cache
    def modules() -> dict[str, str]:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        blocks = [node for node in tree.body if isinstance(node, ast.If)]
        imports = [node for node in blocks[0].body if isinstance(node, ast.ImportFrom)]
        return {alias.name: str(node.module) for node in imports for alias in node.names}

    def attribute(name: str) -> Any:
        if name.startswith("__") or name not in modules():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules()[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return attribute
