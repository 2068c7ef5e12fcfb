"""A reader of tars written from docs/cache-format.md alone: tarfile, JSON, pcodec, NumPy."""

import hashlib
import json
import struct
import tarfile
import urllib.parse
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import safetensors.numpy
from pcodec import standalone

from scalekd.cache import open_cache


def parsed(packed: bytes, fields: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    assert packed[:4] == b"SKDV"
    assert google_crc32c.value(packed[:-4]) == struct.unpack("<I", packed[-4:])[0]
    coded = [field for field in fields if field["coding"] != "raw"]
    version, count, zero = struct.unpack_from("<BBH", packed, 4)
    assert (version, count, zero) == (1, len(coded), 0)
    at, found = 8, {}
    for field in fields[: len(fields) - count]:
        num_values = int(np.prod(field["shape"], dtype=int))
        values = np.frombuffer(packed, np.dtype(field["dtype"]).newbyteorder("<"), num_values, at)
        found[field["name"]] = values.reshape(field["shape"])
        at += values.nbytes
    sizes = struct.unpack_from(f"<{count}I", packed, at)
    at += 4 * count
    for field, size in zip(coded, sizes, strict=True):
        assert field["coding"] == "pcodec"
        values = np.empty(field["shape"], field["dtype"])
        data = packed[at : at + size]
        if size == values.nbytes:
            values = np.frombuffer(data, field["dtype"]).reshape(field["shape"])
        else:
            standalone.simple_decompress_into(data, values.reshape(-1))
        found[field["name"]] = values
        at += size
    assert at == len(packed) - 4
    return found


def test_a_tar_has_the_documented_content(sound_tars: Path, image_bytes: dict[int, bytes]) -> None:
    fields = json.loads((sound_tars / "passes/fields.json").read_text())["fields"]
    form = json.loads((sound_tars / "webdataset.json").read_text())
    assert form == {"embed": "source", "format": "scalekd-webdataset", "format_version": 1}
    reader = open_cache(sound_tars)
    names = [field["name"] for field in fields[1:]]
    expected = reader.read_rows(1, 48, 22, names)
    path = sound_tars / "passes/0001/000002.tar"
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for entry in tar:
            stem, _, extension = entry.name.partition(".")
            file = tar.extractfile(entry)
            assert file is not None
            samples.setdefault(urllib.parse.unquote(stem), {})[extension] = file.read()
    assert list(samples) == [reader.samples.key(number) for number in range(48, 70)]
    for row, members in enumerate(samples.values()):
        number = 48 + row
        assert members["png" if number % 5 == 0 else "jpg"] == image_bytes[number]
        assert int(members["cls"]) == number % 10
        view = parsed(members["skd"], fields)
        assert int(view["source_hash"]) == reader.samples.source_hashes[number]
        for name in names:
            np.testing.assert_array_equal(view[name], expected[name][row])
    content = path.read_bytes()
    index = safetensors.numpy.load(path.with_suffix(".index.safetensors").read_bytes())
    for (offset, size), digest in zip(index["blocks"], index["block_sha256"], strict=True):
        assert hashlib.sha256(content[offset : offset + size]).digest() == digest.tobytes()
    assert content[int(index["blocks"].sum(axis=1)[-1]) :] == bytes(1024)
    for members, (_, _, offset, size) in zip(samples.values(), index["views"], strict=True):
        assert content[offset : offset + size] == members["skd"]
