"""Weights that a run starts from: a file, an exported student, or another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from scalekd.errors import UsageError
from scalekd.models.names import describe_model
from scalekd.models.weights import weights_in
from scalekd.students import resolve_student_name
from scalekd.training import find_run_checkpoint
from scalekd.training.trained import describe_trained_student
from scalekd.views import Interpolation

_TRAINING_ARGUMENTS = ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate")


class InitialWeights(NamedTuple):
    """A file of weights, and the names of the classes that its classifier was trained on."""

    path: Path | None = None
    class_names: tuple[str, ...] | None = None


def initial_weights(model: str, checkpoint: str | None, *, pretrained: bool) -> InitialWeights:
    """Find the weights that a run starts from.

    Args:
        model: Name of the student.
        checkpoint: A file, the folder of an exported student, a run, or a checkpoint in it.
        pretrained: Whether the published weights of ``model`` are read without a checkpoint.

    Raises:
        UsageError: A folder is neither a run, nor a checkpoint, nor an exported student.
        DataError: A run or folder is damaged.
    """
    if checkpoint is None:
        name = resolve_student_name(model)[0] if pretrained else ""
        return InitialWeights(None, _class_names(name) if name.startswith("local-dir:") else None)
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        return InitialWeights(folder)
    if find_run_checkpoint(folder) is not None:
        student = describe_trained_student(folder)
        return InitialWeights(student.weights, student.class_names)
    if (folder / "config.json").is_file():
        return InitialWeights(weights_in(folder), _class_names(f"local-dir:{folder.absolute()}"))
    raise UsageError(_no_weights(checkpoint))


def inherited_settings(checkpoint: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that a new run takes from the student whose weights it starts from.

    Preprocessing is always taken from that student; architecture, its arguments and image size are
    taken if ``given`` names no model.

    Args:
        checkpoint: Value of ``--initial-checkpoint``.
        given: Settings of the new run, which override the result.

    Raises:
        UsageError: ``given`` names no model, and neither does what is at ``checkpoint``.
        DataError: The run is damaged.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir() and find_run_checkpoint(folder) is not None:
        spec = describe_trained_student(folder).spec
        settings: dict[str, Any] = {"mean": spec.mean, "std": spec.std, "crop_pct": spec.crop_pct}
        if spec.interpolation in get_args(Interpolation):
            settings["interpolation"] = spec.interpolation
        if given.get("model"):
            return settings
        dropped = {*_TRAINING_ARGUMENTS, "img_size"}
        arguments = {k: v for k, v in spec.model_kwargs.items() if k not in dropped}
        return {
            **settings,
            "model": spec.architecture,
            "img_size": spec.img_size,
            "model_kwargs": {**arguments, **given.get("model_kwargs", {})},
        }
    if given.get("model"):
        return {}
    if (folder / "config.json").is_file():
        return {"model": f"local-dir:{folder}"}
    if folder.is_dir():
        raise UsageError(_no_weights(checkpoint))
    if folder.exists():
        raise UsageError(
            f"--initial-checkpoint {checkpoint}: holds weights alone; name their student by --model"
        )
    raise UsageError(f"--initial-checkpoint {checkpoint}: there is no such file or folder")


def _no_weights(checkpoint: str) -> str:
    return (
        f"--initial-checkpoint {checkpoint}: neither a file, nor a training run, nor a folder that"
        " scalekd export --format timm wrote"
    )


def _class_names(name: str) -> tuple[str, ...] | None:
    names = describe_model(name).pretrained_cfg.get("label_names")
    sound = isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)
    return tuple(names) if sound and names else None
