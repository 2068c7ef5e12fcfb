"""Training from a cache and its extensions: the named teacher, or the mean of several."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.cache import JoinedReader, open_cache, open_extension
from scalekd.distillation import FullLogits, MeanLogits, TopKLogits
from scalekd.errors import CacheMismatch, UsageError
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines.extend_cache import extend_cache
from scalekd.pipelines.train_student import train_student
from scalekd.training import TrainConfig


@pytest.fixture(scope="module")
def extended(cache: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cache`` with a second teacher's features and logits, and a third's likeliest classes."""
    root = Path(shutil.copytree(cache, tmp_path_factory.mktemp("extended") / "cache"))
    for name, model, changes in (
        ("second", "test_vit2", {"stages": (4,), "codec": "float16"}),
        ("third", "test_vit3", {"logits": "topk:2", "passes": 1}),
    ):
        config = ExtendConfig(
            cache=root,
            data_dir=str(image_folder),
            name=name,
            model=model,
            pretrained=False,
            model_kwargs={"num_classes": 3},
            licence="mit",
            workers=0,
            **changes,  # type: ignore[arg-type]
        )
        assert extend_cache(config).complete
    return root


@pytest.fixture
def train(extended: Path, image_folder: Path, tmp_path: Path) -> Any:
    """Trains two epochs; returns the losses of the last."""

    def train(**changes: Any) -> dict[str, str]:
        options = {
            "cache": str(extended),
            "data_dir": str(image_folder),
            "model": "test_resnet",
            "objective": "kd",
            "epochs": 2,
            "batch_size": 16,
            "workers": 0,
            "amp": "no",
            "val_split": None,
            "output": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"),
            **changes,
        }
        result = train_student(TrainConfig.from_mapping(options))
        with (Path(result.output) / "summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {name: value for name, value in rows[-1].items() if "loss" in name}

    return train


def test_an_extension_trains_like_a_cache_of_its_own(train: Any, extended: Path) -> None:
    named = train(targets="second", objective="scalekd")
    alone = train(cache=str(extended / "extensions/second"), objective="scalekd")
    base = train(objective="scalekd")
    assert named == alone
    assert named["train_stage4_spatial_loss"] != base["train_stage4_spatial_loss"]


def test_logits_come_from_the_requested_extension(train: Any, extended: Path) -> None:
    base, second = train(), train(logits_from=("second",))
    assert second == train(cache=str(extended / "extensions/second"))
    assert len({base["train_kd_loss"], second["train_kd_loss"]}) == 2
    both = train(logits_from=("base", "second"))
    assert both["train_kd_loss"] not in (base["train_kd_loss"], second["train_kd_loss"])
    # The third gives full precision to two of three classes, and was asked about pass 0 alone.
    assert train(logits_from=("base", "second", "third"))


def test_the_mean_of_teachers_is_the_mean_of_their_probabilities() -> None:
    ours = torch.tensor([[2.0, 0.0, -1.0]])
    theirs = torch.tensor([[0.0, 3.0, 0.0]])
    log_sum = theirs.logsumexp(1)
    indices, scores = torch.tensor([[1, 0]]), theirs[:, [1, 0]]
    packed = TopKLogits(
        indices=indices,
        log_probs=scores - log_sum,
        log_sum_exp=log_sum,
        tail_mass=theirs.softmax(1)[:, 2],
        num_classes=3,
    )
    mean = MeanLogits((FullLogits(ours), packed))
    for temperature in (1.0, 4.0):
        expected = ((ours / temperature).softmax(1) + (theirs / temperature).softmax(1)) / 2
        torch.testing.assert_close(mean.probabilities(temperature), expected)
    with pytest.raises(ValueError, match="cannot be averaged"):
        MeanLogits((FullLogits(ours), FullLogits(ours[:, :2])))


def test_only_passes_that_all_have_are_read(extended: Path) -> None:
    base = open_cache(extended)
    joined = JoinedReader(base, {"third": open_extension(base, "third")})
    assert (base.passes, joined.passes) == ((0, 1), (0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "nobody"}, "has no extension 'nobody'; its extensions: second, third"),
        ({"logits_from": ("../base",)}, "cannot name an extension"),
        ({"logits_from": ("second",), "online": True}, "--logits-from"),
        ({"targets": "third", "objective": "scalekd"}, "teacher tail"),
    ],
)
def test_missing_extensions_and_targets_are_refused(
    train: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(**changes)


def test_an_extension_with_other_views_is_refused(
    train: Any, extended: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(extended, tmp_path / "mixed"))
    own, other = root / "passes/0000/pixel_hash/c/0", root / "passes/0001/pixel_hash/c/0"
    assert own.read_bytes() != other.read_bytes()
    reader = open_cache(root)
    joined = JoinedReader(reader, {"second": open_extension(reader, "second")})
    real = joined.extensions["second"].read_rows

    def shifted(*arguments: Any) -> Any:
        rows = real(*arguments)
        return {name: found + found.dtype.type(1) for name, found in rows.items()}

    record = joined.extensions["second"].record(0, 0)
    path = next(path for path in record.files if "pixel_hash" in path)
    del record.files[path]  # as if another version of Blosc had packed them
    joined.read_rows(0, 0, 4, ["second:logits/values"])  # compared row by row, and equal
    joined = JoinedReader(reader, {"second": joined.extensions["second"]})
    joined.extensions["second"].read_rows = shifted  # type: ignore[method-assign]
    with pytest.raises(CacheMismatch, match="other views"):
        joined.read_rows(0, 0, 4, ["second:logits/values"])
