from pathlib import Path

import pytest

from scalekd.errors import UsageError
from scalekd.training import TrainConfig


def test_a_configuration_round_trips_through_yaml(tmp_path: Path) -> None:
    config = TrainConfig.from_mapping(
        {
            "model": "resnet50",
            "output": "run",
            "opt-betas": [0.9, 0.95],
            "distillation": {"stage4": {"frequency_weight": 0}},
        }
    )
    (tmp_path / "args.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "args.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"leanring_rate": 1}, "unknown key 'leanring_rate'"),
        ({"weigth_decay": 1}, "did you mean 'weight_decay'"),
        ({"lr": 0}, "lr = 0 is not possible"),
        ({"epochs": "many"}, "epochs = 'many' is not possible"),
        ({"sched": "plateau"}, "sched = 'plateau' is not possible"),
        ({"distillation": {"kd_alpah": 1}}, "'distillation.kd_alpah'; did you mean 'kd_alpha'"),
        ({"model": None}, "model = None is not possible"),
        ({"seed": 1 << 32}, "seed = 4294967296 is not possible"),  # NumPy's limit
        ({"workers": 999_999}, "workers = 999999 is not possible: .* equal to 1024"),
    ],
)
def test_a_wrong_key_or_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig.from_mapping({"model": "resnet50", "output": "run", **values})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UsageError, match="'model' is missing"):
        TrainConfig.from_mapping({"output": "run"})


def test_the_task_loss_follows_timms_flags() -> None:
    config = TrainConfig(model="m", output="o", smoothing=0.1, bce_loss=True)
    assert config.objective_config.label_smoothing == 0.1
    assert config.objective_config.task == "bce"
    plain = TrainConfig(model="m", output="o")
    assert plain.objective_config == plain.distillation
