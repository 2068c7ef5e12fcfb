"""The published schemas equal those of the models, and the frozen caches match them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache.documents.schema import file_name, schemas

_REPOSITORY = Path(__file__).parents[3]
_PUBLISHED = _REPOSITORY / "docs" / "schema"
_FROZEN = Path(__file__).parents[1] / "frozen" / "format1"


def _published(name: str) -> Any:
    return json.loads((_PUBLISHED / file_name(name)).read_text())


def _check(schema: Any, value: Any, root: Any, place: str = "") -> None:
    """As much of JSON Schema as pydantic writes; ``place`` is for the failure's message."""
    if "$ref" in schema:
        reference = schema["$ref"]
        if not reference.startswith("#"):
            root = json.loads((_PUBLISHED / reference).read_text())
            _check(root, value, root, place)
            return
        _check(root["$defs"][reference.removeprefix("#/$defs/")], value, root, place)
        return
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                _check(option, value, root, place)
            except AssertionError:
                continue
            return
        raise AssertionError(f"{place}: {value!r} fits none of {schema['anyOf']}")
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "type" in schema:
        assert isinstance(value, types[schema["type"]]), place
        assert schema["type"] == "boolean" or not isinstance(value, bool), place
    assert value == schema.get("const", value), place
    assert value in schema.get("enum", [value]), place
    if isinstance(value, str) and "pattern" in schema:
        assert re.search(schema["pattern"], value), place
    if isinstance(value, int | float):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), place
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), place
        items = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        for number, (inner, item) in enumerate(zip(items, value, strict=True)):
            _check(inner, item, root, f"{place}[{number}]")
    if isinstance(value, dict):
        assert set(schema.get("required", [])) <= set(value), place
        properties = schema.get("properties", {})
        for key, item in value.items():
            rest = [s for p, s in schema.get("patternProperties", {}).items() if re.search(p, key)]
            found = properties.get(
                key, rest[0] if rest else schema.get("additionalProperties", True)
            )
            assert found is not False, f"{place}.{key}"
            if isinstance(found, dict):
                _check(found, item, root, f"{place}.{key}")


def test_the_published_schemas_are_up_to_date() -> None:
    """If not, run python -m scalekd.cache.documents.schema docs/schema."""
    assert schemas() == {path.name: path.read_bytes() for path in _PUBLISHED.iterdir()}


@pytest.mark.parametrize("cache", ["float16", "int8", "transform"])
def test_frozen_documents_fit(cache: str) -> None:
    root = _FROZEN / cache
    documents = [("manifest", root / "manifest.json"), ("plan", root / "plan.json")]
    documents += [("record", path) for path in sorted((root / "records").rglob("*.json"))]
    assert len(documents) > 5
    for name, path in documents:
        schema = _published(name)
        _check(schema, json.loads(path.read_bytes()), schema)


def test_an_edited_document_does_not_fit() -> None:
    """Of the test's own check: it sees inside maps, lists, references and the teacher's schema."""
    schema = _published("manifest")
    edits: list[tuple[list[Any], Any]] = [
        (["plan", "identity", "views", "view_size"], [24]),
        (["plan", "identity", "teacher", "img_size", 0], "24"),
        (["plan", "identity", "format_version"], 2),
        (["plan", "identity", "stages", "4", "num_channels"], 0),
        (["num_passes"], True),
        (["files", "plan.json", "surprise"], 1),
    ]
    for place, value in edits:
        document = json.loads((_FROZEN / "float16" / "manifest.json").read_bytes())
        node = document
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        with pytest.raises(AssertionError):
            _check(schema, document, schema)
