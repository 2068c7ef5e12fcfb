"""``scalekd cache repair`` as a user meets it."""

import json
from pathlib import Path

import pytest

from scalekd.cli.main import main


def test_damage_is_reported_repaired_and_gone(
    cache_copy: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache_copy / "passes/0001/pixel_hash/c/1").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["cache", "verify", str(cache_copy)])
    assert stop.value.code == 4
    main(["cache", "repair", str(cache_copy), "--data-dir", str(tiny_images), "-j", "0", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["mended"] == ["passes/0001/pixel_hash/c/1"]
    assert result["shards_redone"] == [["1", 1]]
    main(["cache", "verify", str(cache_copy)])


def test_an_unexpected_file_that_remains_is_a_failure(
    cache_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache_copy / "extra").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main(["cache", "repair", str(cache_copy)])
    assert stop.value.code == 4
    assert "--remove-extra" in capsys.readouterr().err
    main(["cache", "repair", str(cache_copy), "--remove-extra"])
    assert not (cache_copy / "extra").exists()


def test_images_are_asked_for_only_when_they_are_needed(
    cache_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache_copy / "zarr.json").unlink()
    main(["cache", "repair", str(cache_copy)])
    (cache_copy / "samples/key/c/0/0").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["cache", "repair", str(cache_copy)])
    assert stop.value.code == 2
    assert "--data-dir" in capsys.readouterr().err
