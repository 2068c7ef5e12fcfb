"""Passes are added and shards repaired from images on a store, which are kept on the local disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _image_bytes(store: Any) -> int:
    return sum(r.num_bytes for r in store.requests if r.path.endswith(".tar"))


def test_extend_and_repair_fetch_each_image_shard_once(
    s3: Any,
    upload: Callable[[Path, str], None],
    tiny_images: Path,
    cache_copy: Path,
    tmp_path: Path,
    run: Callable[..., Any],
) -> None:
    upload(tiny_images, f"{s3.bucket}/images")
    shards = sum(path.stat().st_size for path in tiny_images.glob("*.tar"))
    damaged = cache_copy / "passes/0001/stage4/values/c/4/0/0"
    options = ["--data-dir", f"{s3.bucket}/images", "-j", "0"]
    options += ["--local-cache", tmp_path / "copies", "--local-cache-size", "1GB"]
    s3.reset()
    assert run("cache", "extend", cache_copy, "--passes", "3", *options).code == 0
    assert shards <= _image_bytes(s3) < 2 * shards
    complete = damaged.read_bytes()
    damaged.write_bytes(b"")
    s3.reset()
    assert run("cache", "repair", cache_copy, *options).code == 0
    named = ["--name", "int8", "--stages", "final", "--codec", "int8"]
    assert run("cache", "extend", cache_copy, *named, *options).code == 0
    assert damaged.read_bytes() == complete
    assert _image_bytes(s3) == 0


@pytest.mark.parametrize("command", ["extend", "repair"])
def test_an_invalid_size_of_the_local_cache_is_refused(
    command: str, cache_copy: Path, tiny_images: Path, run: Callable[..., Any]
) -> None:
    ran = run(
        *("cache", command, cache_copy, "--data-dir", tiny_images, "--local-cache-size", "much")
    )
    assert ran.code == 2
    assert "--local-cache-size" in ran.err
