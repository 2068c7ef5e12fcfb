"""The price that ``--dry-run`` names, worked out by hand, and compared with what a cache takes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache.forms import TarForm
from scalekd.errors import UsageError
from scalekd.pipelines import _calibrate
from scalekd.pipelines import cache_teacher as stage_one
from scalekd.pipelines import estimate as estimating
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._probe import Disk, Probe
from scalekd.pipelines.estimate import CacheEstimate, Host, estimate_cache
from scalekd.teachers import Teacher
from tests.conftest import tiny_teacher

Price = Callable[..., CacheEstimate]

# A GPU that says 1,000 views/s beside 16 cores.
GPU = Host(num_cores=16, num_workers=8, num_coding_threads=15, teacher_threads=0)
PROBE = Probe(
    teacher_seconds=0.001,
    draw_seconds=0.004,
    coding_seconds=0.006,
    target_bytes=9_000.0,
    shard_size=4096,
)


def priced(probe: Probe = PROBE, host: Host = GPU, **changes: Any) -> CacheEstimate:
    job = {"num_samples": 900_000, "num_passes": 8, "num_calibration_views": 0}
    rest: dict[str, Any] = {"free_bytes": 10**12, "peak_memory_bytes": 2 * 10**9, **job, **changes}
    return CacheEstimate.of(probe, host, **rest)


@pytest.mark.parametrize(
    ("probe", "host", "seconds"),
    [
        (PROBE, GPU, 0.001),  # 1 ms of teacher; 0.5 of drawing, 0.4 of coding, 0.625 a core
        (PROBE, replace(GPU, num_workers=2), 0.002),  # 4 ms of drawing by two
        (PROBE, replace(GPU, num_coding_threads=3), 0.002),  # 6 ms of coding by three
        (PROBE, replace(GPU, num_cores=4), 0.0025),  # 10 ms of work by four cores
        (PROBE, replace(GPU, num_workers=0), 0.005),  # drawn between forwards
        # On a CPU the forward takes 4 cores for 100 ms: 410 ms of work by four cores.
        (replace(PROBE, teacher_seconds=0.1), Host(4, 2, 3, 4), 0.1025),
    ],
)
def test_a_view_takes_as_long_as_the_slowest_part_or_all_cores_need(
    probe: Probe, host: Host, seconds: float
) -> None:
    assert host.seconds_per_view(probe) == pytest.approx(seconds)


def test_hours_are_those_of_all_views_after_the_calibration() -> None:
    price = priced()  # 7.2 million views of 1 ms
    assert price.hours == pytest.approx(2.0)
    assert price.calibration_hours == 0
    calibrated = priced(num_calibration_views=3_600)  # 3.6 s more
    assert calibrated.calibration_hours == pytest.approx(0.001)
    assert calibrated.hours == pytest.approx(2.001)


def test_calibration_on_a_cpu_has_one_thread() -> None:
    cpu = Host(num_cores=4, num_workers=2, num_coding_threads=3, teacher_threads=4)
    slow = replace(PROBE, teacher_seconds=0.1)
    assert cpu.calibration_seconds(slow, 1000) == pytest.approx(400)
    assert replace(cpu, num_workers=0).calibration_seconds(slow, 1000) == pytest.approx(404)
    assert GPU.calibration_seconds(PROBE, 1000) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        ({}, 9_016),  # and two hashes of eight bytes
        # Two members: headers of 512 each, a block for the label, half a block after the fields.
        ({"overhead_bytes": TarForm("none").overhead_bytes}, 9_016 + 1_792),
        # A third, the image of 5,000 bytes: its header, and half a block after it.
        (
            {"overhead_bytes": TarForm("source").overhead_bytes, "image_bytes": 5_000.0},
            9_016 + 1_792 + 5_768,
        ),
    ],
)
def test_bytes_follow_from_the_probe(changes: dict[str, Any], num_bytes: int) -> None:
    price = priced(replace(PROBE, **changes))
    assert price.bytes_per_view == num_bytes
    assert price.total_bytes == 7_200_000 * num_bytes


def test_the_break_even_compares_cached_and_live_epochs() -> None:
    """A student of 1,500 views/s: 1,500 s an epoch beside the teacher, 600 s without."""
    student = replace(PROBE, student_seconds=1 / 1500)
    price = priced(student)
    assert price.live_epoch_hours == pytest.approx(1500 / 3600)
    assert price.cached_epoch_hours == pytest.approx(600 / 3600)
    assert price.break_even_epochs == pytest.approx(7200 / 900, rel=1e-4)
    # Two workers draw a view in 2 ms: a live teacher adds nothing to them but for the forward pass.
    two = priced(student, replace(GPU, num_workers=2))
    assert two.live_epoch_hours == two.cached_epoch_hours == pytest.approx(0.5)
    assert two.break_even_epochs is None
    assert "does not pay for itself" in two.lines()[-1]
    # Eight draw a view in 0.5 ms, more than a quick student takes: the cache saves less.
    quick = priced(replace(PROBE, student_seconds=0.0001))
    assert quick.cached_epoch_hours == pytest.approx(0.125)
    assert quick.break_even_epochs == pytest.approx(7200 / (990 - 450), rel=1e-4)
    # On 4 cores, teacher and student take all of them: 410 + 200 ms of core time against 204.
    cpu = replace(PROBE, teacher_seconds=0.1, student_seconds=0.05, coding_seconds=0.0)
    shared = priced(cpu, Host(4, 2, 3, 4))
    assert shared.live_epoch_hours == pytest.approx(900_000 * (0.6 + 0.004) / 4 / 3600)
    assert shared.cached_epoch_hours == pytest.approx(900_000 * (0.2 + 0.004) / 4 / 3600)
    assert priced().break_even_epochs is None  # no student was measured
    assert priced(replace(student, teacher_seconds=0.0)).break_even_epochs is None


def test_the_disk_may_be_the_slowest_part() -> None:
    files = replace(PROBE, block_size=256, block_files=4, shard_size=4096, shard_files=16)
    assert files.files_per_view == 4 / 256 + 16 / 4096  # 80 files of 4,096 views
    disk = Disk(bytes_per_second=9_016 * 1_000.0, file_seconds=0.1)  # 1 ms of bytes, 1.95 of files
    assert GPU.seconds_per_view(files, disk) == pytest.approx(0.001 + 0.1 * 80 / 4096)
    assert GPU.seconds_per_view(files, Disk(1e12, 1e-6)) == pytest.approx(0.001)  # the teacher
    price = priced(files, disk=disk)
    # 3,516 blocks and 220 shards a pass, and 220 shards of the samples with 4 files each.
    assert price.num_files == 8 * (3516 * 4 + 220 * 16) + 220 * 4
    # After the last view: 256 views of 6 ms by one thread, and 20 files.
    assert price.drain_seconds == pytest.approx(256 * 0.006 + 20 * 0.1)
    assert priced(files).drain_seconds == pytest.approx(256 * 0.006)
    assert price.seconds_per_file == 0.1
    assert priced(files).disk_bytes_per_second is None


def test_the_printed_estimate() -> None:
    probe = replace(PROBE, student_seconds=1 / 1500)
    assert priced(probe, num_calibration_views=360_000).lines() == [
        "900,000 samples x 8 passes: 64.9 GB (9,016 B per view, without tail and"
        " tables), 1.0 TB are free",
        "about 2 h 6 min with one process here, of which calibration takes 6 min (fitting the"
        " codec adds minutes): teacher 1,000.0 views/s, drawing 250 views/s per worker",
        "memory so far 2.0 GB; 880 files",
        "pays for itself after 8.4 epochs of training, of all students together: an epoch of"
        " resnet50 (its bare step) takes 25 min with the live teacher and 10 min with the cache",
    ]
    views_only = priced(replace(PROBE, teacher_seconds=0.0), free_bytes=None).lines()
    assert views_only[0].endswith("B per view, without tail and tables)")
    assert "no teacher is run" in views_only[1]
    assert not any("pays" in line for line in views_only)


# Of a real probe


@pytest.fixture
def settings(tiny_images: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "teacher": tiny_teacher(),
        "data_dir": str(tiny_images),
        "output": tmp_path / "cache",
        "workers": 0,
        "codec": "float16",
    }


@pytest.mark.parametrize(
    "form",
    [{}, {"embed": "pixels"}, {"format": "webdataset"}, {"format": "webdataset", "embed": "view"}],
    ids=str,
)
def test_estimated_bytes_are_those_of_the_written_cache(
    form: dict[str, Any], settings: dict[str, Any], make_cache: Callable[..., Any]
) -> None:
    sizes = {"shard_size": 80, "block_size": 80}
    price = estimate_cache(CacheTeacherConfig(**settings, passes=2, **sizes, **form))
    assert not settings["output"].exists()
    written = make_cache(settings["output"], passes=2, **sizes, **form)
    files = (path for path in settings["output"].rglob("*") if path.is_file())
    tables = sum(p.stat().st_size for p in settings["output"].glob("tables/*"))
    num_bytes = sum(path.stat().st_size for path in files) - tables
    assert written.num_samples * 2 == 140
    # Keys, labels, view parameters and documents are not priced: some 150 bytes a view here.
    assert price.total_bytes == pytest.approx(num_bytes, rel=0.25)
    assert price.bytes_per_view * 140 == price.total_bytes
    assert price.student_views_per_second is not None
    assert price.student_views_per_second > 0
    assert price.disk_bytes_per_second is not None
    assert price.live_epoch_hours is not None
    assert price.cached_epoch_hours is not None
    assert price.live_epoch_hours > price.cached_epoch_hours
    kinds = ("passes/**/c/**/*", "passes/0*/0*.*", "samples/*/c/**/*", "records/*/*.json")
    paths = {path for kind in kinds for path in settings["output"].glob(kind) if path.is_file()}
    assert price.num_files == len(paths)


def test_a_url_has_no_free_space(settings: dict[str, Any]) -> None:
    price = estimate_cache(CacheTeacherConfig(**{**settings, "output": "memory://cache"}))
    assert price.free_bytes is None
    assert not any("free" in line for line in price.lines())
    local = estimate_cache(CacheTeacherConfig(**settings))
    assert local.free_bytes is not None
    in_url = {**settings, "output": f"file://{settings['output']}"}
    in_file_url = estimate_cache(CacheTeacherConfig(**in_url))
    assert in_file_url.free_bytes == pytest.approx(local.free_bytes, rel=0.1)


def test_the_probe_calibrates_as_the_job_does(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    of = CacheEstimate.of

    def noting(*arguments: Any, **named: Any) -> CacheEstimate:
        seen.append(named["num_calibration_views"])
        return of(*arguments, **named)

    monkeypatch.setattr(CacheEstimate, "of", noting)
    monkeypatch.setattr(_calibrate, "_PREFIX_VIEWS", 20)
    monkeypatch.setattr(_calibrate, "_HELD_OUT_VIEWS", 10)
    estimate_cache(CacheTeacherConfig(**settings))
    estimate_cache(CacheTeacherConfig(**settings, stages=()))
    assert seen == [30, 30]  # the tail's prefix tokens, whatever stages are kept


@pytest.mark.parametrize("kept", [70_000, 11, 0])
def test_topk_names_the_limit_of_the_teacher(kept: int, settings: dict[str, Any]) -> None:
    config = CacheTeacherConfig(**settings, logits=f"topk:{kept}")
    expected = "keeps no class; give a number from 1" if kept == 0 else "from 1 to 10, or"
    for work in (estimating.estimate_cache, stage_one.cache_teacher):
        with pytest.raises(UsageError, match=expected):
            work(config)
    with pytest.raises(UsageError, match="give full for all classes, topk:K"):
        estimate_cache(CacheTeacherConfig(**settings, logits="topk:" + "9" * 5000))


def test_without_targets_the_teacher_runs_for_its_tail_alone(
    settings: dict[str, Any],
    make_cache: Callable[..., Any],
    file_contents: Callable[[Path], dict[str, bytes]],
    sound_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    forward = Teacher.forward

    def counting(self: Teacher, pixels: Any) -> Any:
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(Teacher, "forward", counting)
    price = estimate_cache(CacheTeacherConfig(**settings, stages=(), logits="none"))
    assert price.teacher_views_per_second is None
    assert seen == []
    assert make_cache(settings["output"], stages=(), logits="none").complete
    assert sum(seen) <= 70  # of 140 views; the tail's prefix tokens are a mean over some of pass 0
    views, whole = file_contents(settings["output"]), file_contents(sound_cache)
    drawn = [path for path in views if path.startswith(("passes/0001/view", "passes/0001/pixel"))]
    assert len(drawn) > 6
    assert all(views[path] == whole[path] for path in drawn)
