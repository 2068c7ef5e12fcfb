"""How a machine computes is recorded, and said where it matters; and what decides it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalekd.cache.cache import Cache
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import ShardRecord
from scalekd.cache.writing.writer import CacheWriter
from scalekd.errors import CacheMismatch, UsageError
from scalekd.pipelines import _arithmetic, _job, _write_shards
from scalekd.pipelines._arithmetic import auto_precision, compute_environment, strict_float32
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._shard_division import divide
from scalekd.pipelines._source_options import RepairConfig
from scalekd.pipelines.inspect_cache import cache_info, verify_cache
from scalekd.pipelines.repair_cache import repair_cache

FileContents = Callable[[Path], dict[str, bytes]]
ELSEWHERE = {"device": "NVIDIA A100", "cuda": "12.8", "encoder": "numpy"}
RECORD = "records/0001/000001.json"


@pytest.fixture
def mixed(make_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of which one shard was computed by another machine, to the same bytes."""
    root = tmp_path / "mixed"
    make_cache(root)
    for path in (RECORD, "manifest.json"):
        (root / path).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(_job, "compute_environment", lambda *_: ELSEWHERE)
        assert make_cache(root).complete
    return root


def _record(root: Path, path: str = RECORD) -> ShardRecord:
    return ShardRecord.model_validate_json((root / path).read_bytes())


def test_a_plan_records_how_targets_were_computed(sound_cache: Path) -> None:
    plan = json.loads((sound_cache / "plan.json").read_bytes())
    computed = plan["provenance"]["computed"]
    assert computed == compute_environment(torch.device("cpu"), "numpy", None)
    assert computed["encoder"] == "numpy"
    assert computed["torch"] == torch.__version__
    for path in sound_cache.glob("records/*/*.json"):
        assert "computed" not in json.loads(path.read_bytes())  # as the plan says
    assert "computed_otherwise" not in json.loads((sound_cache / "manifest.json").read_bytes())


def test_documents_of_older_releases_keep_their_bytes(sound_cache: Path) -> None:
    content = (sound_cache / RECORD).read_bytes()
    assert canonical(ShardRecord.model_validate_json(content)) == content


def test_a_cache_computed_on_two_machines_records_both(mixed: Path, sound_cache: Path) -> None:
    assert _record(mixed).computed == ELSEWHERE
    assert _record(mixed, "records/0000/000001.json").computed is None
    info = cache_info(mixed)
    assert info.computed_otherwise == (ELSEWHERE,)
    (line,) = (line for line in info.lines() if "and, mixed," in line)
    assert line.endswith("NVIDIA A100, cuda 12.8, encoder numpy")
    assert not any("and, mixed," in line for line in cache_info(sound_cache).lines())
    assert verify_cache(str(mixed)).sound


def test_a_lost_record_of_a_cache_of_two_machines_is_written_again(
    mixed: Path, tiny_images: Path
) -> None:
    content = (mixed / RECORD).read_bytes()
    (mixed / RECORD).unlink()
    assert repair_cache(RepairConfig(cache=mixed, data_dir=str(tiny_images))).sound
    assert (mixed / RECORD).read_bytes() == content


def test_a_shard_is_repaired_with_the_encoder_that_wrote_it(
    make_cache: Callable[..., Any],
    file_contents: FileContents,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "cache"
    with monkeypatch.context() as patch:
        for module in (_job, _write_shards):
            patch.setattr(module, "default_encoder", lambda device: "torch")
        make_cache(root, codec="transform:error=0.05", passes=1)
    before = file_contents(root)
    damaged = next(root.glob("passes/0000/stage4/coefficients/c/**/*"))
    while damaged.is_dir():
        damaged = next(damaged.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    seen = []
    write = _write_shards.write_claimed

    def noted(*args: Any, encoder: str, **more: Any) -> int:
        seen.append(encoder)
        return write(*args, encoder=encoder, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("scalekd.pipelines.repair_cache.write_claimed", noted)
    assert repair_cache(RepairConfig(cache=root, data_dir=str(tiny_images))).sound
    assert seen == ["torch"]
    assert file_contents(root) == before


def test_repair_names_the_machine_that_it_needs(
    mixed: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mixed / "passes/0001/stage4/values/c/3/0/0").unlink()
    run = _write_shards.run_teacher

    def otherwise(*args: Any) -> Any:
        output = run(*args)
        output.features[4][:] += 0.1
        return output

    monkeypatch.setattr(_write_shards, "run_teacher", otherwise)
    with pytest.raises(CacheMismatch, match=r"device NVIDIA A100 there, cpu .* here.*such a machi"):
        repair_cache(RepairConfig(cache=mixed, data_dir=str(tiny_images)))


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_arithmetic, "_driver", lambda: "580.1")
    with strict_float32():
        facts = compute_environment(torch.device("cuda"), "torch", "inductor")
    assert facts["device"] == "NVIDIA H200"
    assert facts["capability"] == "9.0"
    assert facts["tf32"] == "off"
    assert facts["driver"] == "580.1"
    assert facts["compiler"] == "inductor"
    assert "flash" in facts["attention"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert "cudnn" in compute_environment(torch.device("cuda"), "torch", None)["tf32"]


def test_tf32_is_off_inside_the_block_and_restored_after_it() -> None:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]

    def inside() -> None:
        with strict_float32():
            assert not any(backend.allow_tf32 for backend in backends)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        inside()
    assert [backend.allow_tf32 for backend in backends] == before


def test_auto_precision_is_bfloat16_if_the_gpu_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto_precision(torch.device("cpu")) == "fp32"
    for has_it, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it, **_: has_it)
        assert auto_precision(torch.device("cuda")) == expected


def test_auto_precision_is_that_of_an_existing_cache(
    make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    make_cache(tmp_path / "cache", passes=1, precision="bf16")
    assert make_cache(tmp_path / "cache", passes=2).complete
    assert cache_info(tmp_path / "cache").precision == "bf16"
    with pytest.raises(CacheMismatch, match="precision"):
        make_cache(tmp_path / "cache", passes=3, precision="fp32")
    make_cache(tmp_path / "cache", passes=1, overwrite=True)
    assert cache_info(tmp_path / "cache").precision == "fp32"


def test_workers_follow_the_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def default(cores: int, processes: int, *, has_gpu: bool) -> int:
        monkeypatch.setattr(_arithmetic.os, "sched_getaffinity", lambda _: range(cores))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
        return CacheTeacherConfig(
            teacher={"model": "x"},  # type: ignore[arg-type]
            data_dir="",
            output="",
        ).workers

    assert default(16, 1, has_gpu=False) == 2
    assert default(16, 1, has_gpu=True) == 14
    assert default(128, 8, has_gpu=True) == 14
    assert default(128, 1, has_gpu=True) == 16
    assert default(2, 1, has_gpu=True) == 2


def test_an_unknown_compiler_is_refused_before_anything_else(
    make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--torchcompile inductr: no such backend"):
        make_cache(tmp_path / "cache", torchcompile="inductr")
    assert not (tmp_path / "cache").exists()


def test_a_compiled_teacher_is_recorded(make_cache: Callable[..., Any], tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", passes=1, torchcompile="eager")
    assert (cache_info(tmp_path / "cache").computed or {})["compiler"] == "eager"


def test_a_writer_of_a_folder_takes_over_shards_of_others(sound_cache: Path) -> None:
    first: Any = SimpleNamespace(index=0, count=2)
    with CacheWriter(Cache.open(sound_cache)) as writer:
        assert divide(writer, None, 1, first).shards  # of a complete cache: others' only


def test_a_process_without_work_takes_over_shards_of_others() -> None:
    """Every shard is somebody's own, and the others come after it, the last first."""
    identity = SimpleNamespace(num_shards=5, rows_of=lambda shard: 10)
    writer = SimpleNamespace(
        plan=SimpleNamespace(identity=identity),
        is_remote=False,
        missing=lambda unit, shards: [s for s in shards if (unit, s) != (0, 0)],
    )

    def work_of(rank: int) -> Any:
        processes: Any = SimpleNamespace(index=rank, count=3)
        return divide(writer, None, 2, processes)  # type: ignore[arg-type]

    work = [work_of(rank) for rank in range(3)]
    every = {(unit, shard) for unit in range(2) for shard in range(5)}
    own = [w.shards[: w.num_views // 10] for w in work]
    assert sorted(pair for pairs in own for pair in pairs) == sorted(every - {(0, 0)})
    assert [w.num_committed for w in work] == [1, 0, 0]
    assert max(map(len, own)) - min(map(len, own)) <= 1
    for w in work:
        assert set(w.shards) >= every - {(0, 0)}
        assert len(set(w.shards)) == len(w.shards)
    writer.is_remote = True  # sent to a URL: nobody else's shards, for there are no leases
    assert 10 * len(work_of(0).shards) == work_of(0).num_views
