"""The paths that files of a cache may have; a document that names another path is refused.

Fetching a cache writes files to the user's disk. The paths of each kind of file therefore match one
pattern, so that no document can name ``.git/config``, a file outside the cache, or a file that
another program would read.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

_PASS = r"passes/[0-9]{4}"
_SHARD = r"[0-9]{6,7}"
_ARRAY = r"(?:/[a-z][a-z0-9_]*)"


class _Pattern:
    """Validator of the paths of one kind of file."""

    def __init__(self, kind: str, pattern: str) -> None:
        self._kind, self._pattern = kind, re.compile(pattern, re.ASCII)

    def __call__(self, path: str) -> str:
        if self._pattern.fullmatch(path) is None:
            raise ValueError(f"{path[:80]!r} is not the path of {self._kind}")
        return path

    @property
    def schema(self) -> WithJsonSchema:
        return WithJsonSchema({"type": "string", "pattern": f"^(?:{self._pattern.pattern})$"})


_TABLE = r"tables/(?:tail|witnesses|stage[34])-[0-9a-f]{16}\.safetensors"

_TAIL = _Pattern("a tail", r"tables/tail-[0-9a-f]{16}\.safetensors")
_WITNESSES = _Pattern("witnesses", r"tables/witnesses-[0-9a-f]{16}\.safetensors")
_CODEC_TABLES = _Pattern("codec tables", r"tables/stage[34]-[0-9a-f]{16}\.safetensors")
_DOCUMENT = _Pattern(
    "a document or table of a cache",
    rf"plan\.json|webdataset\.json|images\.json|_info\.json|passes/fields\.json|{_TABLE}"
    rf"|zarr\.json|passes/zarr\.json|(?:samples|{_PASS}){_ARRAY}*/zarr\.json",
)
_RECORD = _Pattern("a commit record", rf"records/(?:samples|[0-9]{{4}})/{_SHARD}\.json")
_DATA = _Pattern(
    "a file of a shard",
    rf"(?:samples|{_PASS}){_ARRAY}+/c(?:/[0-9]{{1,16}})+"
    rf"|{_PASS}/{_SHARD}\.(?:tar|index\.safetensors)",
)

TailPath = Annotated[str, AfterValidator(_TAIL), _TAIL.schema]
WitnessesPath = Annotated[str, AfterValidator(_WITNESSES), _WITNESSES.schema]
CodecTablesPath = Annotated[str, AfterValidator(_CODEC_TABLES), _CODEC_TABLES.schema]
DocumentPath = Annotated[str, AfterValidator(_DOCUMENT), _DOCUMENT.schema]
"""Path of a file that the manifest names: plan, form, tables, metadata of arrays."""
RecordPath = Annotated[str, AfterValidator(_RECORD), _RECORD.schema]
DataPath = Annotated[str, AfterValidator(_DATA), _DATA.schema]
"""Path of a file that a commit record names: a chunk of an array, a tar or its index."""
