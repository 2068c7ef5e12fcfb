"""The command line of stage one: exit codes, one-line errors, JSON at the end, instant help."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
"""The ``run`` of conftest.py."""


@pytest.fixture
def options(tiny_images: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "--model": "test_vit.r160_in1k",
        "--data-dir": tiny_images,
        "--output": tmp_path / "cache",
        "--img-size": 32,
        "--model-kwargs": "num_classes=10",
        "--limit": 20,
        "--codec": "float16",
        "-b": 10,
        "-j": 0,
    }


@pytest.fixture
def cache_teacher(run: Run, options: dict[str, object]) -> Run:
    """``scalekd cache-teacher`` on the tiny image set; keywords replace options."""

    def cache_teacher(*flags: object, **changes: object) -> Any:
        chosen = {**options, **{f"--{k.replace('_', '-')}": v for k, v in changes.items()}}
        pairs = [part for pair in chosen.items() if pair[1] is not None for part in pair]
        return run("cache-teacher", "--no-pretrained", *pairs, *flags)

    return cache_teacher


def _is_one_line(err: str) -> bool:
    return err.startswith("scalekd: error: ") and err.count("\n") == 1


def test_the_commands_of_stage_one_work_together(
    cache_teacher: Run, run: Run, options: dict[str, object]
) -> None:
    written = cache_teacher("--json", passes=2)
    assert written.code == 0, written.err
    assert written.json["complete"]
    assert written.json["views_written"] == 40
    cache = options["--output"]
    info = run("cache", "info", cache, "--json")
    assert info.code == 0
    assert info.json["num_samples"] == 20
    assert info.json["num_passes"] == 2
    assert info.json["cache_id"] == written.json["cache_id"]
    assert set(info.json["stages"]) == {"3", "4"}
    verified = run("cache", "verify", cache, "--json")
    assert verified.code == 0
    assert verified.json["sound"]
    plain = run("cache", "info", cache)
    assert "2 passes of crop+flip" in plain.out
    resumed = cache_teacher("--json", passes=2)
    assert (resumed.code, resumed.json["shards_written"]) == (0, 0)


def test_a_short_name_prints_its_expansion(cache_teacher: Run) -> None:
    ran = cache_teacher("--dry-run", model="test_vit")
    assert ran.code == 0
    assert ran.err.startswith("test_vit stands for test_vit.r160_in1k")


def test_a_dry_run_estimates_the_job_and_writes_nothing(
    cache_teacher: Run, options: dict[str, object]
) -> None:
    ran = cache_teacher("--dry-run", "--json", passes=3, codec="float16")
    assert ran.code == 0, ran.err
    assert ran.json["num_passes"] == 3
    # Two stages of 5 x 64 values and ten logits in two bytes each, nearly incompressible.
    assert 1000 < ran.json["bytes_per_view"] < 1500
    assert ran.json["total_bytes"] == pytest.approx(60 * ran.json["bytes_per_view"])
    assert ran.json["hours"] > 0
    assert not Path(str(options["--output"])).exists()
    assert "20 samples x 3 passes" in cache_teacher("--dry-run", passes=3).out


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model": "vit_smal_patch16_224"}, 2, "vit_small_patch16_224"),
        ({"img_size": 33}, 2, "multiples of 16"),
        ({"img_size": -32}, 2, ""),
        ({"aug": "crop+flap"}, 2, "flap"),
        ({"codec": "int9"}, 2, "did you mean 'int8'"),
        ({"logits": "some"}, 2, "topk:K"),
        ({"logits": "topk:11"}, 2, "11"),
        ({"passes": 0}, 2, "--passes"),
        ({"limit": 0}, 2, "--limit"),
        ({"seed": -1}, 2, "--seed"),
        ({"shard_size": 10**9}, 2, "--shard-size"),
        ({"shards": "5-9"}, 2, "shards 0 to 0"),
        ({"model_kwargs": "num_classes=0", "logits": "full"}, 2, "--logits none"),
        ({"data_dir": "/nowhere"}, 3, "no such folder"),
        ({"split": "validation"}, 3, "neither validation-*.tar nor a folder"),
        ({"split": "train-{0..9}.tar"}, 3, "no file matches"),
    ],
    ids=str,
)
def test_an_impossible_request_is_one_line_before_any_work(
    changes: dict[str, object],
    code: int,
    message: str,
    cache_teacher: Run,
    options: dict[str, object],
) -> None:
    ran = cache_teacher("--json", **changes)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert _is_one_line(ran.err)
    assert not Path(str(options["--output"])).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache-teacher"],
        ["cache-techer"],
        ["cache", "inform"],
        ["cache", "info"],
        ["cache-teacher", "--stages", "5"],
        ["cache-teacher", "--shards", "1-b"],
        ["cache-teacher", "--model-kwargs", "novalue"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], run: Run) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert "Error" in ran.err or "Missing" in ran.err


def test_an_output_folder_of_something_else_is_refused(
    cache_teacher: Run, options: dict[str, object]
) -> None:
    output = Path(str(options["--output"]))
    output.mkdir()
    (output / "thesis.tex").write_text("")
    ran = cache_teacher()
    assert ran.code == 2
    assert "thesis.tex" in ran.err
    assert _is_one_line(ran.err)


def test_a_headless_teacher_is_fine_without_logits(
    cache_teacher: Run, run: Run, options: dict[str, object]
) -> None:
    assert cache_teacher(model_kwargs="num_classes=0", logits="none").code == 0
    assert run("cache", "info", options["--output"], "--json").json["logits"] is None


def test_another_job_on_the_same_folder_has_its_own_exit_code(cache_teacher: Run) -> None:
    assert cache_teacher(passes=1).code == 0
    ran = cache_teacher(seed=5)
    assert ran.code == 4
    assert "views.seed is 0 in the cache, 5 here" in ran.err
    assert _is_one_line(ran.err)
    assert cache_teacher("--overwrite", seed=5).code == 0


def test_a_corrupt_image_is_named_and_may_be_skipped(
    cache_teacher: Run,
    run: Run,
    options: dict[str, object],
    image_bytes: dict[int, bytes],
    image_set: Callable[..., Path],
) -> None:
    data = image_set({**image_bytes, 4: image_bytes[4][:100]})
    ran = cache_teacher(data_dir=data)
    assert ran.code == 3
    assert "sample-004" in ran.err
    assert "--skip-corrupt" in ran.err
    assert _is_one_line(ran.err)
    ran = cache_teacher("--skip-corrupt", "--overwrite", data_dir=data)
    assert ran.code == 0
    assert "1 corrupt images skipped" in ran.out
    info = run("cache", "info", options["--output"]).out
    assert re.search(r"skipped +sample-004\n", info)


def test_damage_has_its_own_exit_code(cache_copy: Path, run: Run) -> None:
    path = cache_copy / "passes/0001/stage4/values/c/4/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    ran = run("cache", "verify", cache_copy, "--json")
    assert ran.code == 4
    assert not ran.json["sound"]
    assert ran.json["damaged_shards"] == [["1", 1]]
    assert "passes/0001/stage4/values/c/4/0/0 (shard 1 of pass 1)" in ran.json["problems"][0]
    assert _is_one_line(ran.err)
    assert run("cache", "verify", cache_copy, "--quick").code == 4
    plain = run("cache", "verify", cache_copy)
    assert plain.out.startswith("damaged: ")
    (cache_copy / "manifest.json").write_text("{")
    for command in ("info", "verify"):
        ran = run("cache", command, cache_copy)
        assert ran.code == 4
        assert _is_one_line(ran.err)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("cache", "verify", "CACHE", "--data-dir", "x"), "only used with --deep"),
        (("cache", "pull", "CACHE", "x", "--logits-only", "--stages", "4"), "leave out --stages"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: tuple[str, ...], told: str, sound_cache: Path, run: Run, tmp_path: Path
) -> None:
    places = {"CACHE": str(sound_cache), "x": str(tmp_path / "x")}
    ran = run(*(places.get(argument, argument) for argument in arguments))
    assert ran.code == 2
    assert told in ran.err
    assert not (tmp_path / "x").exists()


def test_a_missing_cache_is_a_data_error(tmp_path: Path, run: Run) -> None:
    for command in ("info", "verify"):
        ran = run("cache", command, tmp_path / "nowhere")
        assert ran.code == 3
        assert _is_one_line(ran.err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_environment_fault(
    cache_teacher: Run, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ran = cache_teacher(output=tmp_path / "locked" / "cache")
    assert ran.code == 5
    assert "permission denied" in ran.err


def test_an_error_of_the_file_system_is_an_environment_fault(cache_teacher: Run) -> None:
    ran = cache_teacher(output="/proc/scalekd-cache")
    assert ran.code == 5
    assert _is_one_line(ran.err)


def test_ctrl_c_reports_that_committed_work_is_kept(
    cache_teacher: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalekd.pipelines import cache_teacher as stage_one

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_one, "_write_shards", interrupted)
    ran = cache_teacher()
    assert ran.code == 130
    assert "the same command continues from there" in ran.err
    monkeypatch.undo()
    assert cache_teacher().code == 0


_LIGHT = """
import sys
import scalekd
from scalekd.cli.main import main
for arguments in (["--help"], ["cache", "--help"], ["--version"], ["cache-teacher", "--help"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code, stop.code
heavy = {"torch", "timm", "numpy", "zarr", "torchvision", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_and_help_load_nothing_heavy() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LIGHT], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "cache-teacher" in ran.stdout
    assert "Run a teacher once" in ran.stdout
