"""A job is the same, made from options or from the cache that they gave."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache import open_cache
from scalekd.cache.documents.manifest import Identity
from scalekd.errors import CacheMismatch
from scalekd.pipelines._job import Job, Tables
from scalekd.pipelines._source_options import CacheSources

MakeCache = Callable[..., Any]


@pytest.fixture
def job_of(tiny_images: Path) -> Callable[[Path], Job]:
    def job_of(cache: Path) -> Job:
        reader = open_cache(cache)
        sources = CacheSources(cache=cache, data_dir=str(tiny_images), workers=0)
        return Job.of(reader.cache, sources)

    return job_of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "aug": "crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25",
            "seed": 7,
            "interpolation": "bilinear",
        },
        {"format": "webdataset", "embed": "view", "skip_corrupt": True, "limit": 30},
        {"stages": (4,), "logits": "topk:3", "codec": "int8", "precision": "bf16", "batch_size": 7},
        {"stages": (), "logits": "none", "class_map": "none"},
    ],
    ids=lambda options: "+".join(options),
)
def test_the_job_of_a_cache_has_its_identity(
    options: dict[str, Any], tmp_path: Path, make_cache: MakeCache, job_of: Callable[[Path], Job]
) -> None:
    make_cache(tmp_path / "cache", passes=1, **options)
    reader = open_cache(tmp_path / "cache")
    job = job_of(tmp_path / "cache")
    assert job.identity(Tables.of(reader.identity)) == reader.identity
    assert job.drawn.embed == options.get("embed", "none")
    job.check(reader.manifest.plan)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 11}, "batch_size is 10 in the cache, 11 here"),
        ({"shard_size": 48}, "shard_size is 24 in the cache, 48 here"),
        ({"precision": "fp16"}, "precision is fp32 in the cache, fp16 here"),
    ],
)
def test_another_job_cannot_continue_a_cache(
    change: dict[str, Any], named: str, sound_cache: Path, job_of: Callable[[Path], Job]
) -> None:
    plan = open_cache(sound_cache).manifest.plan
    with pytest.raises(CacheMismatch, match=rf"/cache was begun for something else: {named}\."):
        replace(job_of(sound_cache), **change).check(plan)


def test_versions_and_the_source_of_weights_do_not_change_the_job(
    sound_cache: Path, job_of: Callable[[Path], Job]
) -> None:
    job, plan = job_of(sound_cache), open_cache(sound_cache).manifest.plan
    other = plan.identity.model_dump(mode="json")
    other["views"]["environment"] = {"pillow": "9.0"}
    other["teacher"] |= {"model": "local-dir:elsewhere", "licence": "mit"}
    job.check(plan.model_copy(update={"identity": Identity.model_validate(other)}))
    other["teacher"]["weights_sha256"] = "0" * 64
    with pytest.raises(CacheMismatch, match=r"teacher\.weights_sha256"):
        job.check(plan.model_copy(update={"identity": Identity.model_validate(other)}))


def test_a_file_url_names_a_folder(
    tmp_path: Path,
    make_cache: MakeCache,
    sound_cache: Path,
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    assert make_cache(f"file://{tmp_path}/cache").complete
    assert file_contents(tmp_path / "cache") == file_contents(sound_cache)
