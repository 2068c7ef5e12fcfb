"""``scalekd evaluate``."""

from typing import TYPE_CHECKING

from scalekd.cli._paths import check_data_dir
from scalekd.cli._record import record_command
from scalekd.pipelines._run_options import EvaluateConfig

if TYPE_CHECKING:
    from scalekd.pipelines.evaluate import Evaluation


@record_command("evaluate", EvaluateConfig, arguments=("model",))
def command(config: EvaluateConfig) -> "Evaluation":
    """Top-1 and top-5 of MODEL: a training run, a checkpoint in it, or any timm model.

    A model without classes is evaluated by its features: --knn-split, --linear-probe.
    """
    check_data_dir(config.data_dir, config.split)

    from scalekd.pipelines.evaluate import evaluate

    return evaluate(config)
