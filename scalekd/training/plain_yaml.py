"""YAML that may come from someone else: plain data, bounded in size, depth and number of values.

PyYAML's safe loader runs no code, yet 600 bytes of nested aliases expand to 10^9 values, deep
nesting ends in a RecursionError, and dates or binary tags give objects that no setting expects.
"""

from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 256 << 10  # PyYAML reads about 100 kB a second
_MAX_DEPTH = 20
_MAX_INTEGER = 2**63
_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in _TYPES)


class _Loader(yaml.SafeLoader):
    """Refuses aliases, deep nesting and every tag but those of JSON's types."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write the value out")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {_MAX_DEPTH} levels")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node.tag not in _TAGS:
            raise yaml.YAMLError(f"a value with the tag {node.tag[:60]!r} is not read: quote it")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if abs(number) > _MAX_INTEGER:
            raise yaml.YAMLError("a whole number beyond 64 bits")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Writes equal values out each time, because aliases are not read back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def load_plain(text: str) -> Any:
    """Parse one YAML document of plain data.

    Raises:
        ValueError: It is not YAML, too large, nested too deeply, or contains aliases or tags.
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(f"has more than {_MAX_BYTES:,} characters")
    try:
        return yaml.load(text, _Loader)  # a subclass of the safe loader
    except (yaml.YAMLError, RecursionError, TypeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error


def read_text(path: Path) -> str:
    """Read a text file of at most the size that :func:`load_plain` takes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, or too large.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"has more than {_MAX_BYTES:,} bytes")
    return content.decode("utf-8")


def dump_plain(values: Any) -> str:
    """Write plain data so that :func:`load_plain` gives it back, names in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text
