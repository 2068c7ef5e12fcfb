"""The published JSON schemas of format 1, made from the models that the reader uses.

    python -m scalekd.cache.documents.schema docs/schema

The reader also checks what a schema cannot express, such as a digest of the document's own content
and sizes that depend on one another; ``docs/cache-format.md`` describes these rules.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from scalekd.cache.documents import FORMAT_VERSION
from scalekd.cache.documents.manifest import Manifest, Plan, ShardRecord
from scalekd.cache.documents.selection import Selection
from scalekd.cache.forms.images import ImagesForm
from scalekd.cache.forms.webdataset.form import PackedFields, WebDatasetForm
from scalekd.teachers import TeacherSpec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_MODELS: dict[str, type[BaseModel]] = {
    "manifest": Manifest,
    "plan": Plan,
    "record": ShardRecord,
    "selection": Selection,
    "teacher": TeacherSpec,
    "webdataset": WebDatasetForm,
    "fields": PackedFields,
    "images": ImagesForm,
}


def schemas() -> dict[str, bytes]:
    """Return the content of each schema, by file name."""
    contents = {}
    for name, model in _MODELS.items():
        document: dict[str, Any] = {"$schema": _DIALECT, **model.model_json_schema()}
        # The models keep the teacher as plain JSON; its schema is a file of its own.
        identity = document.get("$defs", {}).get("Identity")
        if identity is not None:
            identity["properties"]["teacher"] = {"$ref": file_name("teacher")}
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
        contents[file_name(name)] = text.encode() + b"\n"
    return contents


def file_name(document: str) -> str:
    """Return the file name of the schema of a document such as ``manifest``."""
    return f"{document}.v{FORMAT_VERSION}.json"


if __name__ == "__main__":
    for path, content in schemas().items():
        Path(sys.argv[1], path).write_bytes(content)
