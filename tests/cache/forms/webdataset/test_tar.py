"""Names of members: WebDataset sees one sample for any key, and the name gives the key."""

import io
import re
import tarfile
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scalekd.cache.forms.webdataset.blocks import (
    END_OF_ARCHIVE,
    image_extension,
    member,
    member_stem,
)

KEYS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60)


@given(KEYS)
def test_a_stem_is_one_key_for_webdataset_and_gives_the_key_back(key: str) -> None:
    stem = member_stem(key)
    assert urllib.parse.unquote(stem) == key
    assert re.fullmatch(r"[A-Za-z0-9_~%-][A-Za-z0-9_~%/-]*", stem)
    assert not stem.startswith(("/", "__"))


def test_plain_keys_stay_as_they_are() -> None:
    assert member_stem("n01440764/n01440764_10026") == "n01440764/n01440764_10026"
    assert member_stem("n01/a.JPEG") == "n01/a%2EJPEG"
    assert member_stem("../../etc/passwd") == "%2E%2E/%2E%2E/etc/passwd"
    assert member_stem("/etc") == "%2Fetc"


@pytest.mark.parametrize("name", ["a.jpg", "n/" + "x" * 98 + ".skd", "long/" * 60 + "name.webp"])
def test_members_lie_at_the_recorded_offsets(name: str) -> None:
    data, start = member(name, b"content")
    assert data[start : start + 7] == b"content"
    assert len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data + END_OF_ARCHIVE)) as tar:
        (found,) = tar.getmembers()
        file = tar.extractfile(found)
        assert file is not None
        assert (found.name, file.read(), found.offset_data) == (name, b"content", start)


@pytest.mark.parametrize(
    ("form", "extension"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("PPM", "ppm"),
    ],
)
def test_the_extension_follows_from_the_images_bytes(form: str, extension: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, form)
    assert image_extension(buffer.getvalue()) == extension
