"""``scalekd cache export``: decoded values, keyed, that other programs read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from scalekd.cache import open_cache, read_features, read_logits
from scalekd.errors import DataError, UsageError
from scalekd.pipelines import export_targets as module
from scalekd.pipelines._cache_options import ExportTargetsConfig
from scalekd.pipelines.export_targets import export_targets

MakeCache = Callable[..., Any]
Rows = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes of 70 samples, in blocks of fewer, float16."""
    output = tmp_path_factory.mktemp("export") / "cache"
    make_cache(output, passes=2, codec="float16", shard_size=32)
    return output


def _export(cache: Path, output: Path, **options: Any) -> Any:
    return export_targets(ExportTargetsConfig(cache=str(cache), output=output, **options))


def _stored(cache: Path, name: str) -> Rows:
    """Read an array of float16 as stored, pass by pass."""
    reader = open_cache(cache)
    return np.concatenate(
        [
            reader.read_rows(number, first, count, [name])[name]
            for number in reader.passes
            for first, count in reader.blocks()
        ]
    ).astype(np.float32)


def _keys(cache: Path) -> list[str]:
    reader = open_cache(cache)
    return [reader.samples.key(row) for row in range(len(reader.samples))]


def _numpy(output: Path, what: str) -> tuple[list[str], Rows, Rows, Rows, dict[str, str]]:
    arrays = {
        name: np.load(output / f"{name}.npy", allow_pickle=False)
        for name in ("keys", "passes", "labels", what)
    }
    facts = json.loads((output / "facts.json").read_text(encoding="utf-8"))
    return arrays["keys"].tolist(), arrays["passes"], arrays["labels"], arrays[what], facts


def _parquet(output: Path, what: str) -> tuple[list[str], Rows, Rows, Rows, dict[str, str]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(output)
    facts = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    shape = json.loads(facts["scalekd.shape"])
    flat = table.column(what).combine_chunks().values.to_numpy(zero_copy_only=False)
    columns = [table.column(name) for name in ("key", "pass", "label")]
    return (
        columns[0].to_pylist(),
        columns[1].to_numpy(),
        columns[2].to_numpy(),
        flat.reshape(-1, *shape),
        facts,
    )


def _safetensors(output: Path, what: str) -> tuple[list[str], Rows, Rows, Rows, dict[str, str]]:
    with safetensors.safe_open(output, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = file.metadata()
    keys = [bytes(row).rstrip(b"\0").decode() for row in tensors["keys"]]
    return keys, tensors["passes"], tensors["labels"], tensors[what], facts


_READ = {"npy": _numpy, "parquet": _parquet, "safetensors": _safetensors}


@pytest.mark.parametrize("form", _READ)
@pytest.mark.parametrize(
    ("what", "array"), [("logits", "logits/values"), ("tokens", "stage4/values")]
)
def test_exported_values_equal_the_decoded_ones(
    cache: Path, tmp_path: Path, form: str, what: str, array: str
) -> None:
    result = _export(cache, tmp_path / "out", what=what, to=form)
    keys, passes, labels, values, facts = _READ[form](tmp_path / "out", what)
    stored = _stored(cache, array)
    assert values.dtype == np.float32
    assert np.array_equal(values, stored)
    assert result.shape == stored.shape
    assert keys == 2 * _keys(cache)
    assert passes.tolist() == [0] * 70 + [1] * 70
    assert labels.tolist() == 2 * open_cache(cache).samples.labels.tolist()
    manifest = open_cache(cache).manifest
    assert facts["scalekd.cache_id"] == manifest.plan.cache_id
    assert json.loads(facts["scalekd.teacher"]) == manifest.plan.identity.teacher
    assert json.loads(facts["scalekd.shape"]) == list(stored.shape[1:])
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("form", _READ)
def test_pooled_features_of_chosen_passes_and_keys(cache: Path, tmp_path: Path, form: str) -> None:
    chosen = [_keys(cache)[number] for number in (40, 3)]
    options = {"to": form, "passes": (1, 1), "keys": tuple(chosen)}
    _export(cache, tmp_path / "mean", what="pooled", **options)
    _export(cache, tmp_path / "class", what="pooled", pool="class", dtype="float16", **options)
    stored = _stored(cache, "stage4/values")[70:][[40, 3]]
    keys, passes, _, mean, facts = _READ[form](tmp_path / "mean", "pooled")
    assert keys == chosen
    assert passes.tolist() == [1, 1]
    assert facts["scalekd.pool"] == "mean"
    num_prefix = int(facts["scalekd.num_prefix_tokens"])
    np.testing.assert_allclose(mean, stored[:, num_prefix:].mean(axis=1), rtol=1e-6)
    token = _READ[form](tmp_path / "class", "pooled")[3]
    assert token.dtype == np.float16
    assert np.array_equal(token, stored[:, 0].astype(np.float16))


def test_logits_open_in_duckdb(cache: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    output = tmp_path / "logits.parquet"
    _export(cache, output, what="logits", to="parquet")
    rows = duckdb.sql(
        f"select key, pass, list_position(logits, list_max(logits)) - 1, logits from '{output}'"
        " order by pass, key"
    ).fetchall()
    stored, order = _stored(cache, "logits/values"), np.argsort(_keys(cache))
    expected = np.concatenate([stored[:70][order], stored[70:][order]])
    assert [row[0] for row in rows] == 2 * sorted(_keys(cache))
    assert [row[2] for row in rows] == expected.argmax(axis=1).tolist()
    assert np.array_equal(np.array([row[3] for row in rows], np.float32), expected)


def test_logits_open_in_datasets(cache: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    output = tmp_path / "logits.parquet"
    _export(cache, output, what="logits", to="parquet")
    table = datasets.Dataset.from_parquet(str(output), cache_dir=str(tmp_path / "hf"))
    assert table["key"][:] == 2 * _keys(cache)
    values = np.array(table["logits"][:], np.float32)
    assert np.array_equal(values, _stored(cache, "logits/values"))


def test_blocks_are_read_one_at_a_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def counted(*arguments: Any, **options: Any) -> Rows:
        counts.append(options["count"])
        return read_features(*arguments, **options)

    monkeypatch.setattr(module, "read_features", counted)
    _export(cache, tmp_path / "out", what="tokens", to="npy")
    assert counts == 2 * [count for _, count in open_cache(cache).blocks()]
    assert max(counts) <= 32


def test_topk_logits_are_log_probabilities(make_cache: MakeCache, tmp_path: Path) -> None:
    make_cache(tmp_path / "full", logits="full", limit=20)
    make_cache(tmp_path / "topk", logits="topk:3", limit=20)
    full, topk = (
        read_logits(open_cache(tmp_path / name), pass_index=0, first=0, count=20)
        for name in ("full", "topk")
    )
    probabilities = np.exp(full - full.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1)
    kept = np.take_along_axis(np.exp(topk), order[:, :3], axis=1)
    assert np.allclose(kept, np.take_along_axis(probabilities, order[:, :3], axis=1), atol=2e-3)
    assert np.allclose(np.exp(topk).sum(axis=1), 1, atol=2e-3)
    others = np.take_along_axis(topk, order[:, 3:], axis=1)
    assert np.allclose(others, others[:, :1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"what": "logits"}, UsageError, "has no logits"),
        ({"what": "tokens", "stage": 3}, UsageError, r"no features of stage 3 \(stages: 4\)"),
        ({"what": "pooled", "passes": (0, 3)}, UsageError, "has passes 0, 1 here"),
        ({"what": "pooled", "passes": (1, 0)}, UsageError, "--passes 1-0"),
        ({"what": "pooled", "keys": ("nobody",)}, DataError, "has no sample 'nobody'"),
    ],
)
def test_missing_targets_are_refused_before_writing(
    make_cache: MakeCache, tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    make_cache(tmp_path / "cache", logits="none", stages=(4,), limit=10)
    with pytest.raises(error, match=message):
        _export(tmp_path / "cache", tmp_path / "out", to="npy", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_an_existing_file_is_not_replaced(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        _export(cache, tmp_path / "out", what="logits", to="safetensors")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_error_leaves_no_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Rows:
        raise DataError("broken")

    monkeypatch.setattr(module, "read_logits", broken)
    for form in _READ:
        with pytest.raises(DataError, match="broken"):
            _export(cache, tmp_path / "out", what="logits", to=form)
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*_: Any, count: int, **__: Any) -> Rows:
        return np.full((count, 10), 1e6, np.float32)

    monkeypatch.setattr(module, "read_logits", large)
    with pytest.raises(DataError, match="--dtype float32"):
        _export(cache, tmp_path / "out", what="logits", to="npy", dtype="float16")


def test_a_missing_package_names_the_extra(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"scalekd\[hf\]"):
        _export(cache, tmp_path / "out", what="logits", to="parquet")


def test_the_documents_lines_read_features(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reading-a-cache.md").read_text(encoding="utf-8")
    lines = page.split("```python\n")[1].split("```")[0]
    assert len(lines.split("\n\n")[1].splitlines()) <= 5
    (tmp_path / "cache").symlink_to(cache)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(lines, "reading-a-cache.md", "exec"), names)  # noqa: S102
    assert names["keys"] == _keys(cache)[-len(names["keys"]) :]
    stored = _stored(cache, "stage4/values")[:70]
    assert np.array_equal(names["features"], stored[-len(names["keys"]) :])
