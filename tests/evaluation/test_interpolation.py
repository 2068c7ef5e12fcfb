"""Evaluation images are resized with the filter that the model asks for, or not at all."""

from typing import Any

import pytest

from scalekd.errors import UsageError
from scalekd.evaluation import EvaluationConfig
from scalekd.pipelines.evaluate import EvaluateConfig, _view

_PIXELS: dict[str, Any] = {"img_size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_uses_the_models_filter_if_views_support_it(interpolation: str) -> None:
    assert EvaluationConfig(**_PIXELS, interpolation=interpolation).policy.interpolation == (
        interpolation
    )


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos", "box", "hamming", "random", ""])
def test_another_filter_is_refused_and_may_be_replaced(interpolation: str) -> None:
    with pytest.raises(UsageError, match=rf"'{interpolation}'.*bicubic or bilinear"):
        EvaluationConfig(**_PIXELS, interpolation=interpolation)

    from scalekd.models.build import Preprocessing

    own = Preprocessing((0.5,) * 3, (0.5,) * 3, interpolation, 1.0)
    asked = EvaluateConfig(model="a", data_dir="d")
    with pytest.raises(UsageError, match="--interpolation"):
        _view(asked, own, (32, 32))
    chosen = EvaluateConfig(model="a", data_dir="d", interpolation="bilinear")
    assert _view(chosen, own, (32, 32)).policy.interpolation == "bilinear"
