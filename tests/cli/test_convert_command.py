"""``cache convert`` and what the other commands say of tars."""

import json
from pathlib import Path
from typing import Any


def test_convert_info_verify_and_doctor(
    run: Any, sound_cache: Path, tiny_images: Path, tmp_path: Path
) -> None:
    tars = tmp_path / "tars"
    convert = ("cache", "convert", sound_cache, tars, "--format", "webdataset", "-j", 0)
    code, out, _ = run(*convert, "--embed", "source", "--data-dir", tiny_images, "--json")
    assert code == 0
    told = json.loads(out.splitlines()[-1])
    assert (told["complete"], told["shards_written"], told["num_passes"]) == (True, 6, 2)
    assert told["total_bytes"] == json.loads((tars / "manifest.json").read_text())["total_bytes"]
    code, out, _ = run("cache", "info", tars)
    assert code == 0
    assert "WebDataset tars with the images" in out
    assert "tars" in out
    code, out, _ = run("cache", "verify", tars, "--deep", 4)
    assert code == 0, out
    assert "4 views drawn again and given to the teacher: 0 differ" in out
    code, out, _ = run("doctor", "--cache", tars, "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["cache"]["num_exact"] == 64
    code, out, _ = run("cache", "convert", tars, tmp_path / "back", "--format", "zarr")
    assert code == 0
    assert "complete; 2 passes, 3 shards (6 written now)" in out
    code, _, error = run("cache", "verify", tmp_path / "back", "--deep", 4)
    assert code == 2
    assert "pass --data-dir" in error


def test_an_impossible_conversion_is_one_line(run: Any, sound_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "tars"
    convert = ("cache", "convert", sound_cache, output)
    assert run(*convert)[0] == 2
    assert run(*convert, "--format", "tar")[0] == 2
    for options, code, message in [
        (("--format", "zarr"), 2, "in Zarr form already"),
        (("--format", "webdataset", "--embed", "view"), 2, "pass --data-dir"),
        (("--format", "webdataset", "--shards", "7"), 2, "has shards 0 to 2"),
        (("--format", "webdataset", "--embed", "view", "--data-dir", tmp_path), 3, "has neither"),
    ]:
        found = run(*convert, *options)
        assert found[0] == code
        assert message in found[2]
        assert len(found[2].splitlines()) == 1
    assert not output.exists()
