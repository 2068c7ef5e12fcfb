"""Table files of a malicious author: the digests are right, but the content is of another kind."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.errors import CacheCorrupt
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.pipelines.merge_caches import merge_caches
from scalekd.pipelines.share_cache import ShareConfig, share_cache
from tests.reliability.mutations import sealed

_FROZEN = Path(__file__).parent / "frozen" / "format1" / "transform"
_GIT = b"[core]\n\trepositoryformatversion = 0\n\tfsmonitor = touch PWNED\n"


def _tail_with(content: bytes, **changes: Any) -> bytes:
    """The same tensors under another configuration."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    config = json.loads(header["__metadata__"]["scalekd_tail"])
    config.update(changes)
    header["__metadata__"]["scalekd_tail"] = json.dumps(config)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _arrays(content: bytes, **changes: Any) -> bytes:
    arrays = {**safetensors.numpy.load(content), **changes}
    return safetensors.numpy.save({k: v for k, v in arrays.items() if v is not None})


_FORGERIES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a git configuration as tail": ("tail", lambda _: _GIT),
    "a git configuration as witnesses": ("witnesses", lambda _: _GIT),
    "a git configuration as codec tables": ("stage4", lambda _: _GIT),
    "an empty tail": ("tail", lambda _: b""),
    "a pickled tail": ("tail", lambda _: pickle.dumps({"a": 1})),
    "arrays as tail": ("tail", lambda _: safetensors.numpy.save({"a": np.zeros(3)})),
    "a tail with more behind it": ("tail", lambda content: content + b"#!/bin/sh"),
    "a tail of more classes": ("tail", lambda c: _tail_with(c, num_classes=1 << 16)),
    "a tail of other blocks": ("tail", lambda c: _tail_with(c, tail_blocks=3)),
    "a tail of another size": ("tail", lambda c: _tail_with(c, img_size=[4096, 4096])),
    "a tail of another model": (
        "tail",
        lambda c: _tail_with(c, architecture="vit_base_patch8_224"),
    ),
    "a tail of another width": (
        "tail",
        lambda c: _tail_with(c, model_kwargs={"embed_dim": 1 << 16}),
    ),
    "witnesses of another size": (
        "witnesses",
        lambda c: _arrays(c, pixels=np.zeros((2, 16, 8, 3), np.uint8)),
    ),
    "witnesses and more": ("witnesses", lambda c: _arrays(c, more=np.zeros(3))),
    "tables that lack one": ("stage4", lambda c: _arrays(c, order=None)),
    "tables and more": ("stage4", lambda c: _arrays(c, more=np.zeros(3))),
}


@pytest.fixture(params=_FORGERIES)
def forged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A cache, and the path of the table in it that is something else."""
    name, change = _FORGERIES[request.param]
    root = Path(shutil.copytree(_FROZEN, tmp_path / "forged"))
    base = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    path = next(path for path in base if path.startswith(f"tables/{name}-"))
    for relative, content in sealed(base, {path: change(base[path])}).items():
        (root / relative).write_bytes(content)
    return root, path


def test_the_cache_before_forging_is_intact(tmp_path: Path) -> None:
    root = Path(shutil.copytree(_FROZEN, tmp_path / "cache"))
    base = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert sealed(base, {}) == {}
    assert verify(root).problems == []


def test_a_table_with_other_content_is_not_copied(forged: tuple[Path, str], tmp_path: Path) -> None:
    root, path = forged
    target = tmp_path / "target"
    for command in (
        lambda: share_cache(ShareConfig(source=str(root), target=str(target))),
        lambda: merge_caches([root], target),
        lambda: convert_cache(
            ConvertConfig(source=str(root), output=str(target), format="webdataset", workers=0)
        ),
    ):
        with pytest.raises(CacheCorrupt, match=Path(path).name):
            command()
        assert not (target / path).exists()
        shutil.rmtree(target, ignore_errors=True)


def test_verify_reports_a_table_with_other_content(forged: tuple[Path, str]) -> None:
    root, path = forged

    def read() -> None:
        reader = open_cache(root)
        reader.file(path, reader.manifest.files[path])

    with pytest.raises(CacheCorrupt, match=Path(path).name):
        read()
    if path.startswith("tables/stage"):
        with pytest.raises(CacheCorrupt, match=Path(path).name):
            verify(root)
    else:
        assert any(path in problem for problem in verify(root).problems)
