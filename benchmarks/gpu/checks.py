"""What is written on this device: sound, the same when written again, and close to its teacher."""

import hashlib
import shutil
from pathlib import Path

from benchmarks.gpu._setting import Setting, image_folder
from benchmarks.gpu.caching import ready_codecs
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._source_options import CacheSources
from scalekd.pipelines.cache_teacher import cache_teacher
from scalekd.pipelines.check_replay import deep_verify
from scalekd.pipelines.inspect_cache import verify_cache


def run(setting: Setting) -> None:
    first = setting.work / "check-0"
    setting.part("checks", "written and verified", lambda: _write(setting, first))
    setting.part("checks", "written again", lambda: _again(setting, first), needs=20)


def _cache(setting: Setting, output: Path, **changes: int) -> None:
    shutil.rmtree(output, ignore_errors=True)
    count = 32 if setting.tiny else 768
    with ready_codecs(setting):
        cache_teacher(
            CacheTeacherConfig(
                teacher=setting.teacher,
                data_dir=str(image_folder(setting)),
                output=output,
                aug="crop+flip",
                limit=count,
                batch_size=setting.batch_size // 2,
                shard_size=count // 4,
                **{"workers": min(4, setting.num_workers), **changes},  # type: ignore[arg-type]
            )
        )


def _write(setting: Setting, output: Path) -> None:
    _cache(setting, output)
    report = verify_cache(str(output))
    deep = deep_verify(CacheSources(cache=str(output), data_dir=str(image_folder(setting))), 8)
    setting.report(
        "checks",
        part="written and verified",
        sound=report.sound,
        problems=[*report.problems[:3], *deep.problems[:3]],
        deep_views=deep.num_views,
        largest_error=deep.largest_error,
    )


def _again(setting: Setting, first: Path) -> None:
    """With another number of drawing processes; targets are the same to the bit."""
    second = setting.work / "check-1"
    _cache(setting, second, workers=1)
    ours, theirs = _digests(first), _digests(second)
    different = sorted(path for path in ours.keys() | theirs if ours.get(path) != theirs.get(path))
    setting.report(
        "checks",
        part="written again",
        files=len(ours),
        different=len(different),
        such_as=different[:4],
    )


def _digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
