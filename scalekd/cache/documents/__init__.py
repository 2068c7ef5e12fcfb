"""The JSON documents of a cache: their canonical text, and limits on what is parsed.

Every document is written by :func:`canonical` and read by :func:`parse_committed`, which refuses
any other text with the same content. A document may come from an untrusted source, so its size,
depth and number of values are limited before it is parsed.
"""

import json
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from scalekd.errors import CacheCorrupt, CacheMismatch

FORMAT: Literal["scalekd-cache"] = "scalekd-cache"
FORMAT_VERSION: Literal[1] = 1

_FORMATS = {
    FORMAT: ("cache format", FORMAT_VERSION),
    "scalekd-webdataset": ("WebDataset form", 2),
    "scalekd-images": ("form of images", 1),
}
"""Name and newest version of each kind of document."""

OMIT_DEFAULT = "omit default"
"""Annotation of a field that a document omits while it has its default.

Fields that earlier releases did not write have it, so that the bytes and digests of existing
documents stay the same.
"""

MAX_JSON_BYTES = 64 << 20
_MAX_JSON_VALUES = 1 << 22
_MAX_JSON_DEPTH = 32

Model = TypeVar("Model", bound=BaseModel)


class CacheDocument(BaseModel):
    """Base of every JSON document of a cache; frozen, and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = serialize(self)
        for name, field in type(self).model_fields.items():
            if OMIT_DEFAULT in field.metadata and getattr(self, name) == field.default:
                document.pop(name, None)
        return document


def canonical(model: BaseModel) -> bytes:
    """Return the JSON text of a model: sorted keys, an indent of two spaces, a final newline."""
    text = json.dumps(
        model.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii") + b"\n"


def parse(model: type[Model], data: bytes, *, where: str) -> Model:
    """Read untrusted JSON as ``model``.

    Raises:
        CacheMismatch: It was written by another version of the format.
        CacheCorrupt: It is not JSON, nests too deep, or does not fit the model.
    """
    # Each value but the first needs one of these marks. Lists of lists take 25 times the memory of
    # their text.
    num_values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if num_values > _MAX_JSON_VALUES:
        raise CacheCorrupt(f"{where}: more than {_MAX_JSON_VALUES:,} values")
    try:
        document = json.loads(data)
        check_depth(document)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{where}: not the JSON of a cache ({error})") from None
    _check_version(document, where)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "document"
        problem = str(first["msg"]).removeprefix("Value error, ")
        raise CacheCorrupt(f"{where}: {name}: {problem}") from None


def parse_committed(model: type[Model], data: bytes, *, where: str) -> Model:
    """Read a document that :func:`canonical` wrote, and refuse any other text of its content.

    Raises:
        CacheMismatch, CacheCorrupt: As for :func:`parse`; or the text is not the canonical one.
    """
    document = parse(model, data, where=where)
    if canonical(document) != data:
        raise CacheCorrupt(f"{where}: its bytes changed since it was committed")
    return document


def check_depth(document: Any, *, at_most: int = _MAX_JSON_DEPTH) -> None:
    """Raise ``ValueError`` if a parsed document nests deeper than any document of a cache."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(at_most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it nests deeper than {at_most}")


def _check_version(document: Any, where: str) -> None:
    plan = document.get("plan", document) if isinstance(document, dict) else None
    identity = plan.get("identity") if isinstance(plan, dict) else None
    for part in (document, identity):
        if not isinstance(part, dict) or str(part.get("format")) not in _FORMATS:
            continue
        (name, newest), version = _FORMATS[part["format"]], part.get("format_version")
        if isinstance(version, int) and not 1 <= version <= newest:
            raise CacheMismatch(
                f"{where}: {name} {version}, and this scalekd reads up to version {newest}: "
                + ("update scalekd to read it" if version > newest else "write the cache again")
            )
