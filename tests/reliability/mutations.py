"""Ways to damage a file: bytes, JSON documents, and the digests that would betray it."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import google_crc32c

Files = dict[str, bytes]

_NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    255,
    65_535,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    1 << 40,
    1 << 63,
    1 << 70,
)
_ODD_VALUES: tuple[Any, ...] = (
    *_NUMBERS,
    -(1 << 40),
    0.5,
    -1.5,
    1e308,
    "",
    "x" * 2000,
    "../../etc/passwd",
    "/etc/passwd",
    "tables/../plan.json",
    "hf-hub:stranger/model",
    "a\0b",
    "\u202e\x1b[31m",
    "test_vit",
    "swin_tiny_patch4_window7_224",
    None,
    True,
    False,
    [],
    {},
    [0] * 50,
    [1 << 16, 1 << 16],
    {"a": {"b": [1, 2, 3]}},
)


def mutate_bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """One to three changes; half of them near the start, where headers stand."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _BYTE_CHANGES[rng.randrange(len(_BYTE_CHANGES))](rng, data, other)
    return bytes(data)


def _place(rng: random.Random, data: bytearray) -> int:
    if not data:
        return 0
    return rng.randrange(min(len(data), 24)) if rng.random() < 0.5 else rng.randrange(len(data))


def _flip(rng: random.Random, data: bytearray, other: bytes) -> None:
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, other: bytes) -> None:
    if data:
        data[_place(rng, data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(rng: random.Random, data: bytearray, other: bytes) -> None:
    width = rng.choice((2, 4, 8))
    at = _place(rng, data)
    value = rng.choice(_NUMBERS) & ((1 << 8 * width) - 1)
    data[at : at + width] = value.to_bytes(width, "little")


def _cut(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice((1, 2, 8, 64))]


def _truncate(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _repeat(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = _place(rng, data)
    data[at:at] = data[at : at + rng.choice((1, 4, 16, 64))] * rng.choice((1, 2, 50))


def _insert(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = _place(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))


def _splice(rng: random.Random, data: bytearray, other: bytes) -> None:
    at, start = _place(rng, data), rng.randrange(len(other) + 1)
    piece = other[start : start + rng.choice((4, 16, 64, 1024))]
    data[at : at + len(piece)] = piece


_BYTE_CHANGES: tuple[Callable[[random.Random, bytearray, bytes], None], ...] = (
    _flip,
    _flip,
    _set,
    _set,
    _number,
    _number,
    _cut,
    _truncate,
    _repeat,
    _insert,
    _splice,
)


def mutate_document(rng: random.Random, document: Any) -> None:
    """Change one or two places of a JSON document, in place."""
    for _ in range(rng.choice((1, 1, 2))):
        parent = _descend(rng, document)
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            continue
        key, action = rng.choice(keys), rng.random()
        if action < 0.45:
            parent[key] = rng.choice(_ODD_VALUES)
        elif action < 0.65:
            parent[key] = _near(rng, parent[key])
        elif action < 0.75:
            del parent[key]
        elif action < 0.85:
            other = rng.choice(keys)
            parent[key], parent[other] = parent[other], parent[key]
        elif action < 0.9 and isinstance(parent, dict):
            parent[rng.choice(("surprise", "", "format_version", "../x"))] = parent[key]
        elif action < 0.95 and isinstance(parent, list):
            parent.extend([parent[key]] * rng.choice((1, 5, 100)))
        else:
            source = _descend(rng, document)
            values = list(source.values()) if isinstance(source, dict) else source
            if values:
                parent[key] = json.loads(json.dumps(rng.choice(values)))


def mutate_tables(rng: random.Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, or the JSON that stands as a text inside it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    notes = header.get("__metadata__", {})
    if notes and rng.random() < 0.7:
        name = rng.choice(list(notes))
        inner = json.loads(notes[name])
        mutate_document(rng, inner)
        notes[name] = json.dumps(inner)
    else:
        mutate_document(rng, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _descend(rng: random.Random, node: Any) -> Any:
    """A container of the document: the deeper, the likelier, for most stand deep."""
    while True:
        values = list(node.values()) if isinstance(node, dict) else node
        inner = [value for value in values if isinstance(value, dict | list) and value]
        if not inner or rng.random() < 0.2:
            return node
        node = rng.choice(inner)


def _near(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("", "0", "/", ".", ":", "+", "é", "\n")) + value[at + 1 :]
    return rng.choice(([], {}, [value], {"": value}))


def odd_value(rng: random.Random, value: Any) -> Any:
    """Another value for a leaf of a document: near the old one, of its type, or of another."""
    action = rng.random()
    if action < 0.4:
        return _near(rng, value)
    if action < 0.7 and isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice(_NUMBERS)
    return rng.choice(_ODD_VALUES)


def canonical(document: Any) -> bytes:
    """The bytes that a cache writes of a document."""
    return json.dumps(document, sort_keys=True, indent=2).encode() + b"\n"


def with_checksum(content: bytes) -> bytes:
    """A chunk whose closing crc32c is right again."""
    inner = content[:-4]
    return inner + google_crc32c.value(inner).to_bytes(4, "little")


def entry(content: bytes) -> dict[str, Any]:
    """How a cache records a file."""
    return {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sealed(base: Mapping[str, bytes], changed: Files) -> Files:
    """Change more files, so that every digest of the cache agrees with what was changed.

    Args:
        base: The sound cache.
        changed: New contents; a plan or manifest among them must be JSON objects.

    Returns:
        All files that differ from ``base``.
    """
    files = dict(changed)
    plan = json.loads(files.get("plan.json", base["plan.json"]))
    identity = plan.get("identity")
    tables = {name: entry(files[name]) for name in files if name.startswith("tables/")}
    if isinstance(identity, dict):
        _reseal(identity, tables)
        plan["cache_id"] = hashlib.sha256(canonical(identity)).hexdigest()
    files["plan.json"] = canonical(plan)
    cache_id = plan.get("cache_id")
    data = {name: entry(content) for name, content in files.items()}
    records: dict[str, str] = {}
    for name in (name for name in base if name.startswith("records/")):
        if name not in changed:
            record = json.loads(base[name])
            touched = {path: data[path] for path in record["files"] if path in data}
            if cache_id != record["cache_id"] or touched:
                record["files"].update(touched)
                record["cache_id"] = cache_id
                files[name] = canonical(record)
        if name in files:
            records[name] = hashlib.sha256(files[name]).hexdigest()
    if "manifest.json" in changed:
        manifest = json.loads(changed["manifest.json"])
    else:
        manifest = json.loads(base["manifest.json"])
        manifest["plan"] = plan
        manifest["records"].update(records)
        entries = {name: entry(content) for name, content in files.items()}
        manifest["files"].update({n: e for n, e in entries.items() if n in manifest["files"]})
    manifest["digest"] = ""
    manifest["digest"] = hashlib.sha256(canonical(manifest)).hexdigest()
    files["manifest.json"] = canonical(manifest)
    return {name: content for name, content in files.items() if base.get(name) != content}


def _reseal(node: Any, tables: Mapping[str, dict[str, Any]]) -> None:
    """Put the new digest beside each path of ``tables``."""
    if isinstance(node, list):
        for inner in node:
            _reseal(inner, tables)
    if not isinstance(node, dict):
        return
    for key in ("tail", "witnesses", "tables"):
        path = node.get(key)
        if isinstance(path, str) and path in tables:
            node[f"{key}_digest"] = tables[path]
    for inner in list(node.values()):
        _reseal(inner, tables)
