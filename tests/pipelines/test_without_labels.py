"""From unlabelled photographs to a backbone and a classifier, with a real headless teacher.

The same images as a flat folder, as tars and as a table; in one process and in two; and over HTTP
and S3.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalekd.cache import open_cache
from scalekd.cli.main import main
from scalekd.export import load_backbone
from scalekd.images import ImageOptions, open_dataset

DATA = Path(__file__).parents[3] / "shared" / "data"
PHOTOGRAPHS = DATA / "imagenet-sample"
TEACHER = DATA / "teacher" / "vit_small_patch14_dinov2_headless"
TIMEOUT_SECONDS = 500

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PHOTOGRAPHS.is_dir() and TEACHER.is_dir()),
        reason=f"the data beside the project is not at {DATA}",
    ),
]

CACHE = ("cache-teacher", "--model", f"local-dir:{TEACHER}", "--img-size", 56, "-b", 25, "-j", 0)
TRAIN = ("train-student", "--model", "test_resnet", "--objective", "features", "--epochs", 2)
TRAIN += ("-b", 10, "-j", 0, "--val-split", "none", "--precision", "fp32")


def scalekd(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def trained(output: Path, cache: object, data_dir: object, *options: object) -> dict[str, Any]:
    scalekd(*TRAIN, "--cache", cache, "--data-dir", data_dir, "--output", output, *options)
    return load_file(output / "last/model.safetensors")


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos`` (flat), ``tars``, ``tables`` in the order of both, and a cache of each."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("without-labels")
    (root / "photos").symlink_to(PHOTOGRAPHS)
    images = open_dataset(str(root / "photos"), options=ImageOptions(labels="none"))
    assert (len(images), set(images.labels.tolist())) == (100, {-1})
    # Shards and tables are written in the order of names, as people do.
    samples = sorted(images.read_many(range(100)), key=lambda sample: sample.key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "hf")
        table = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": s.image, "path": None} for s in samples],
                "path": [s.key for s in samples],
                "stem": [Path(s.key).stem for s in samples],
            },
            features=datasets.Features(
                image=datasets.Image(), path=datasets.Value("string"), stem=datasets.Value("string")
            ),
        )
        (root / "tables").mkdir()
        table.to_parquet(str(root / "tables/train-00000-of-00001.parquet"))
        write_tars(root / "tars", [(s.key, s.image) for s in samples])
        plain = ("--labels", "none", "--passes", 2)
        scalekd(*CACHE, *plain, "--data-dir", root / "photos", "--output", root / "of-photos")
        scalekd(*CACHE, *plain, "--data-dir", root / "tars", "--output", root / "of-tars")
        for column in ("path", "stem"):
            keys = ("--data-dir", root / "tables", "--key-column", column)
            scalekd(*CACHE, *plain, *keys, "--output", root / f"of-{column}s")
    return root


def write_tars(folder: Path, images: list[tuple[str, bytes]]) -> None:
    import io
    import tarfile

    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for name, content in images[50 * shard : 50 * shard + 50]:
                info = tarfile.TarInfo(f"{Path(name).stem}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def backbone(work: Path) -> Path:
    trained(work / "backbone", work / "of-photos", work / "photos", "--labels", "none")
    return work / "backbone"


def test_folders_tars_and_tables_train_to_the_same_weights(work: Path, backbone: Path) -> None:
    """Where keys agree: paths with the folder, names up to the dot with the tars."""
    of_folder = load_file(backbone / "last/model.safetensors")
    by_path = ("--key-column", "path")
    of_table = trained(work / "path", work / "of-paths", work / "tables", *by_path)
    assert same(of_folder, of_table)
    of_tars = trained(work / "tar", work / "of-tars", work / "tars")
    by_stem = ("--key-column", "stem")
    of_stems = trained(work / "stem", work / "of-stems", work / "tables", *by_stem)
    assert same(of_tars, of_stems)
    assert not same(of_folder, of_tars)  # other keys draw other views


def test_from_photographs_to_a_classifier_and_a_backbone(
    work: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, path in enumerate(sorted(PHOTOGRAPHS.iterdir())):
        split = "val" if number % 4 == 0 else "train"
        kind = "animal" if path.name < "n024" else "thing"
        (work / "labelled" / split / kind).mkdir(parents=True, exist_ok=True)
        (work / "labelled" / split / kind / path.name).symlink_to(path)
    labelled = ("--data-dir", work / "labelled")
    capsys.readouterr()
    features = ("--knn-split", "train", "--knn-k", 5, "--linear-probe", "train", "-j", 0, "--json")
    scalekd("evaluate", backbone, *labelled, *features)
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["num_samples"] == 25
    assert scores["linear_num_images"] == scores["knn_num_gallery"] == 75
    assert "top1" not in scores

    scalekd("export", backbone, "--output", work / "exported")
    maps = load_backbone(work / "exported")(torch.zeros(1, 3, 64, 96))
    assert [level.shape[3] for level in maps][-1] == 96 // 32

    start = ("--initial-checkpoint", work / "exported", "--objective", "none", "--lr", 1e-3)
    tuned = ("train-student", *start, *labelled, "--epochs", 2, "-b", 25, "-j", 0)
    scalekd(*tuned, "--freeze", "layer[123]", "--output", work / "classifier")
    before = load_file(backbone / "last/model.safetensors")
    after = load_file(work / "classifier/last/model.safetensors")
    assert after.keys() - before.keys() == {"fc.weight", "fc.bias"}
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept >= {name for name in before if name.startswith(("layer1", "layer2", "layer3"))}
    assert any(name.startswith("layer4") for name in before.keys() - kept)
    capsys.readouterr()
    scalekd("evaluate", work / "classifier", *labelled, "-j", 0, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_samples"] == 25


def torchrun(*arguments: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, f"--master-port={port}", "-m", "scalekd", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_two_processes_cache_and_train_without_labels(
    work: Path, file_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    images = ("--data-dir", work / "photos", "--labels", "none")
    torchrun(*CACHE, *images, "--passes", 2, "--output", work / "of-two")
    ours, theirs = (file_contents(work / name) for name in ("of-two", "of-photos"))
    assert {n for n in ours if n.startswith("passes/")} == {
        n for n in theirs if n.startswith("passes/")
    }
    assert all(ours[name] == theirs[name] for name in ours if name.startswith("passes/"))
    torchrun(*TRAIN, "--cache", work / "of-two", *images, "--output", work / "two-run")
    state = json.loads((work / "two-run/last/state.json").read_text())
    assert state["samples_viewed"] == 2 * 100
    assert all(
        t.isfinite().all() for t in load_file(work / "two-run/last/model.safetensors").values()
    )


def test_remote_tars_without_labels_are_cached(
    work: Path, web: Any, s3: Any, upload: Callable[[Path, str], None], tmp_path: Path
) -> None:
    expected = open_cache(work / "of-tars")
    local = trained(tmp_path / "local", work / "of-tars", work / "tars")
    shutil.copytree(work / "tars", web.root / "photos")
    upload(work / "tars", f"{s3.bucket}/photos")
    places = (f"{web.url}/photos/train-{{000000..000001}}.tar", f"{s3.bucket}/photos")
    for number, place in enumerate(places):
        cache = tmp_path / f"cache{number}"
        scalekd(*CACHE, "--passes", 2, "--data-dir", place, "--output", cache)
        reader = open_cache(cache)
        assert reader.samples.keys.tolist() == expected.samples.keys.tolist()
        assert (reader.samples.labels == -1).all()
        split = ("--split", "train") if number else ()
        assert same(trained(tmp_path / f"run{number}", cache, place, *split), local)
