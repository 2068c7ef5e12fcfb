"""Deep verification and the doctor: a cache is compared with its images and its teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from safetensors import safe_open

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import ShardRecord
from scalekd.cache.forms.store import CommittingStore, open_array
from scalekd.cache.writing.finishing import finish
from scalekd.cli.main import main
from scalekd.errors import UsageError
from scalekd.loading import views as data_views
from scalekd.pipelines import doctor
from scalekd.pipelines._source_options import CacheSources
from scalekd.pipelines.check_replay import DeepFindings, deep_verify
from scalekd.pipelines.doctor import diagnose
from tests.reliability.mutations import sealed

Rows = np.ndarray[Any, Any]
Forge = Callable[[str, Callable[[Rows], Rows]], None]


@pytest.fixture
def forge(cache_copy: Path) -> Forge:
    """Changes one array of pass 1, shard 2, and makes every document of the cache agree."""

    def change(name: str, function: Callable[[Rows], Rows]) -> None:
        reader, store = open_cache(cache_copy), CommittingStore(cache_copy)
        array = open_array(store, reader.identity, 1, reader.layout.find(name))
        array[48:70] = function(np.asarray(array[48:70]))
        path = cache_copy / "records/0001/000002.json"
        record = ShardRecord.model_validate_json(path.read_bytes())
        files = {name: store.written.get(name, found) for name, found in record.files.items()}
        path.write_bytes(canonical(record.model_copy(update={"files": files})))
        (cache_copy / "manifest.json").unlink()
        assert finish(reader.cache, 2) is not None
        assert verify(cache_copy).problems == []

    return change


def _deep(root: Path, images: Path, num_views: int = 140) -> DeepFindings:
    return deep_verify(CacheSources(cache=root, data_dir=str(images), workers=0), num_views)


@pytest.mark.parametrize("codec", ["float16", "transform"])
@pytest.mark.parametrize("logits", ["full", "topk:3"])
def test_a_valid_cache_passes_deep_verification(
    codec: str, logits: str, tmp_path: Path, make_cache: Any, tiny_images: Path
) -> None:
    make_cache(tmp_path / "cache", codec=codec, logits=logits)
    found = _deep(tmp_path / "cache", tiny_images, 20)
    assert found.num_views == 20
    assert found.problems == ()
    assert found.largest_error.keys() == {"stage3", "stage4", "logits"}
    assert found.largest_error["stage4"] < (1e-6 if codec == "float16" else 0.1)


_FORGERIES: dict[str, tuple[str, Callable[[Rows], Rows], str]] = {
    "features of other views": ("stage4/values", lambda rows: np.roll(rows, 1, axis=0), "stage4"),
    "features made larger": ("stage3/values", lambda rows: rows * 1.01, "stage3"),
    "logits of zero": ("logits/values", np.zeros_like, "logits"),
    "other pixels": ("pixel_hash", lambda rows: rows ^ 1, "is redrawn differently"),
    "mirrored views": ("view/flip", lambda rows: 1 - rows, "is redrawn differently"),
}


@pytest.mark.parametrize("kind", _FORGERIES)
def test_a_forgery_with_consistent_digests_is_reported(
    kind: str, forge: Forge, cache_copy: Path, tiny_images: Path
) -> None:
    name, function, told = _FORGERIES[kind]
    forge(name, function)
    found = _deep(cache_copy, tiny_images)
    assert len(found.problems) == 22, "the views of the shard, and no other"
    assert all("pass 1, sample sample-0" in problem for problem in found.problems)
    assert all(told in problem for problem in found.problems)


@pytest.mark.parametrize("name", ["model.head.weight", "model.blocks.1.mlp.fc2.bias"])
def test_a_tail_with_other_weights_is_reported(
    name: str, cache_copy: Path, tiny_images: Path, file_contents: Callable[..., dict[str, bytes]]
) -> None:
    base = file_contents(cache_copy)
    (path,) = (path for path in base if path.startswith("tables/tail-"))
    with safe_open(cache_copy / path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(base[path])
    tensors[name][0] += 0.01
    forged = safetensors.torch.save(tensors, metadata=metadata)
    for relative, content in sealed(base, {path: forged}).items():
        (cache_copy / relative).write_bytes(content)
    assert verify(cache_copy).problems == []
    (problem,) = _deep(cache_copy, tiny_images, 4).problems
    assert path in problem
    assert name.removeprefix("model.") in problem


def test_verify_deep_exits_with_4_and_names_the_view(
    forge: Forge, cache_copy: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["cache", "verify", str(cache_copy), "--deep", "9"]
    main([*arguments, "--data-dir", str(tiny_images), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["deep"]["num_views"] == 9
    forge("stage4/values", np.zeros_like)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--data-dir", str(tiny_images)])
    assert stop.value.code == 4
    assert "pass 1, sample sample-0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == UsageError.exit_code


# The doctor


def test_the_machine_that_drew_a_cache_redraws_it_exactly(
    sound_cache: Path, tiny_images: Path
) -> None:
    found = diagnose(sound_cache, data_dir=str(tiny_images), num_views=12)
    assert found.cache is not None
    assert (found.cache.num_views, found.cache.num_exact, found.cache.witness_drift) == (12, 12, 0)
    assert not found.cache.environment_differs
    assert not found.cache.drifts
    assert set(found.works.values()) == {"yes"}
    assert {"torch", "pillow", "libjpeg", "scalekd"} <= found.versions.keys()


def test_drift_is_measured_and_the_versions_are_named(
    sound_cache: Path,
    tiny_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A library that rounds up."""
    render, here = data_views.render, doctor.pixel_environment()

    def otherwise(*arguments: Any, **options: Any) -> Any:
        return np.minimum(render(*arguments, **options), 254) + np.uint8(1)

    monkeypatch.setattr(data_views, "render", otherwise)
    monkeypatch.setattr(doctor, "pixel_environment", lambda: {**here, "pillow": "99.0"})
    arguments = ["doctor", "--cache", str(sound_cache), "--data-dir", str(tiny_images)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--views", "5"])
    assert stop.value.code == 4
    out, err = capsys.readouterr()
    assert f"pillow: {here['pillow']} in the cache, 99.0 here (affects pixels)" in out
    assert "0 of 5 views are identical" in out
    assert "mean difference up to 1/255" in err or "mean difference up to 0.9" in err


def test_without_images_the_doctor_compares_versions_only(
    sound_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--cache", str(sound_cache)])
    assert "pass --data-dir to compare pixels" in capsys.readouterr().out
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["cache"] is None


def test_an_image_that_was_replaced_is_named(
    cache_copy: Path, tiny_images: Path, image_bytes: dict[int, bytes], tmp_path: Path
) -> None:
    """Of the same size, so that the fingerprint of the set is the same."""
    images = Path(shutil.copytree(tiny_images, tmp_path / "images"))
    tar = images / "train-000001.tar"
    png = image_bytes[60]
    content = tar.read_bytes()
    assert content.count(png) == 1
    tar.write_bytes(content.replace(png, png[:-12] + bytes(12)))
    found = _deep(cache_copy, images)
    assert [problem.split(":")[0] for problem in found.problems] == [
        "pass 0, sample sample-060",
        "pass 1, sample sample-060",
    ]
    assert "another image" in found.problems[0]
