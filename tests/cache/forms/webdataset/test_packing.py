"""Packed views have the documented layout and the packed values; other bytes are refused."""

import contextlib
import struct
import tracemalloc
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd

from scalekd.cache.forms.webdataset.packing import SOURCE_HASH, ViewPacking
from scalekd.cache.layout import ArraySpec
from scalekd.codecs import PlaneSpec
from scalekd.errors import CacheCorrupt

NUM_VIEWS = 5
ARRAYS = (
    ArraySpec.of_plane("stage4", PlaneSpec("coefficients", np.dtype("int16"), shape_before=(300,))),
    ArraySpec.of_plane("stage4", PlaneSpec("gains", np.dtype("int16"), shape_before=(1,))),
    ArraySpec.of_plane(
        "stage3", PlaneSpec("codes", np.dtype("int8"), shape_after=(4, 80), compression="zstd")
    ),
    ArraySpec.of_plane("logits", PlaneSpec("tail_mass", np.dtype("float32"))),
    ArraySpec("view/crop", np.dtype(np.uint16), shape_after=(4,)),
    ArraySpec("view/flip", np.dtype(np.uint8)),
    ArraySpec("pixel_hash", np.dtype(np.uint64)),
)
NAMES = [array.name for array in ARRAYS]


def rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    found = {
        array.name: random.integers(
            0, 7, (NUM_VIEWS, *array.shape_before, *array.shape_after)
        ).astype(array.dtype)
        for array in ARRAYS
    }
    found["pixel_hash"] = random.integers(0, 2**64, NUM_VIEWS, dtype=np.uint64)
    found[SOURCE_HASH] = random.integers(0, 2**64, NUM_VIEWS, dtype=np.uint64)
    return found


@pytest.fixture(scope="module")
def packed() -> list[bytes]:
    return ViewPacking(ARRAYS).pack(rows())


def sealed(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


def unpack(views: list[bytes], names: list[str] = NAMES) -> dict[str, np.ndarray]:
    return ViewPacking(ARRAYS).unpack(views, names)


def test_packed_views_round_trip(packed: list[bytes]) -> None:
    expected = rows()
    found = unpack(packed, [*NAMES, SOURCE_HASH])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    some = unpack(packed[2:4], ["stage4/gains", "view/flip"])
    assert set(some) == {"stage4/gains", "view/flip"}
    np.testing.assert_array_equal(some["stage4/gains"], expected["stage4/gains"][2:4])


def test_packed_bytes_have_the_documented_layout(packed: list[bytes]) -> None:
    """Taken apart by hand: head, raw fields, sizes, coded fields, checksum."""
    view, expected = packed[3], {name: values[3] for name, values in rows().items()}
    assert view[:8] == b"SKDV\x01\x04\0\0"
    at = 8
    for name, kind in [(SOURCE_HASH, "Q"), ("view/crop", "4H"), ("view/flip", "B")]:
        values = struct.unpack_from(f"<{kind}", view, at)
        np.testing.assert_array_equal(values, np.atleast_1d(expected[name]))
        at += struct.calcsize(f"<{kind}")
    assert struct.unpack_from("<Q", view, at)[0] == expected["pixel_hash"]
    sizes = struct.unpack_from("<4I", view, at + 8)
    at += 8 + 16
    assert sizes[1] == 2  # one gain is stored as it is
    assert struct.unpack_from("<h", view, at + sizes[0])[0] == expected["stage4/gains"][0]
    assert sizes[2] < 320
    codes = zstd.decompress(view[at + sizes[0] + sizes[1] :][: sizes[2]])
    assert codes == expected["stage3/codes"].tobytes()
    assert at + sum(sizes) + 4 == len(view)
    assert google_crc32c.value(view[:-4]).to_bytes(4, "little") == view[-4:]
    fields = ViewPacking(ARRAYS).fields
    assert [field.coding for field in fields] == ["raw"] * 4 + [
        "pcodec",
        "pcodec",
        "zstd",
        "pcodec",
    ]
    assert fields[4].shape == (300,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda view: view[:20], "too few for a packed view"),
        (lambda view: b"", "too few for a packed view"),
        (lambda view: view[:100] + b"\xff" + view[101:], "crc32c"),
        (lambda view: view[:-1], "crc32c"),
        (lambda view: sealed(b"SKDX" + view[4:-4]), "not a packed view of this cache"),
        (lambda view: sealed(view[:4] + b"\x02" + view[5:-4]), "not a packed view of this cache"),
        (lambda view: sealed(view[:5] + b"\x03" + view[6:-4]), "not a packed view of this cache"),
        (lambda view: sealed(view[:-4] + b"more"), "its parts have"),
        (lambda view: sealed(view[:-5]), "its parts have"),
        (lambda view: sealed(view[:33] + b"\xff\xff\xff\xff" + view[37:-4]), "its parts have"),
    ],
)
def test_other_bytes_are_refused(packed: list[bytes], changed: Any, message: str) -> None:
    with pytest.raises(CacheCorrupt, match=message):
        unpack([packed[0], changed(packed[1])])


def test_planes_with_other_content_are_refused(packed: list[bytes]) -> None:
    view = packed[0]
    sizes, at = list(struct.unpack_from("<4I", view, 33)), 49
    short = bytes(zstd.compress(b"\0" * 319, 3))
    swapped = [*sizes[:2], len(short), *sizes[3:]]
    parts = view[at : at + sizes[0] + sizes[1]] + short + view[at + sum(sizes[:3]) : -4]
    with pytest.raises(CacheCorrupt, match="a zstd frame of 319 bytes; 320"):
        unpack([sealed(view[:33] + struct.pack("<4I", *swapped) + parts)])
    no_pcodec = view[:at] + b"\xee" * sizes[0] + view[at + sizes[0] : -4]
    with pytest.raises(CacheCorrupt, match="coefficients"):
        unpack([sealed(no_pcodec)])


def test_a_small_member_cannot_ask_for_much_memory() -> None:
    huge = ArraySpec.of_plane(
        "stage4", PlaneSpec("values", np.dtype("float16"), shape_before=(1 << 27,))
    )
    packing = ViewPacking([huge])
    tracemalloc.start()
    with pytest.raises(CacheCorrupt, match="4096 times as many"):
        packing.unpack([sealed(b"SKDV\x01\x01\0\0" + bytes(100))], ["stage4/values"])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_members_raise_cache_errors(packed: list[bytes], data: st.DataObject) -> None:
    content = bytearray(packed[0][:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CacheCorrupt):
        unpack([sealed(bytes(content))])
