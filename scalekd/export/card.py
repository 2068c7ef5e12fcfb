"""The model card of an exported student: its model, training and accuracy.

All facts are read from the checkpoint and, for the curves, from the run's ``summary.csv``. The card
omits facts that the run did not record, except for licences, which it lists as not recorded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from scalekd.export.backbone import backbone_arguments
from scalekd.models.architectures import import_for
from scalekd.text import MAX_CELL, markdown, markdown_code, markdown_fence, printable
from scalekd.training.interfaces import SCORES
from scalekd.training.logs import read_summary
from scalekd.training.plain_yaml import dump_plain
from scalekd.training.trained import TrainedStudent

_CURVES_FILE = "curves.png"
_NUM_ROWS = 10  # rows of the table of curves; the picture has every epoch
_TOP1 = {n: f"{label}, %" for n, (label, _) in SCORES.items() if n.endswith("top1")}  # curves
_MAX_SETTINGS = 500  # lines of settings; a run writes fewer than 200
_NOT_RECORDED = "not recorded"
# Settings that are omitted: paths on the training machine, and logging.
_OF_THE_MACHINE = frozenset(
    {
        "recipe",
        "cache",
        "data_dir",
        "output",
        "resume",
        "overwrite",
        "workers",
        "val_cache",
        "initial_checkpoint",
    }
    | {"teacher_checkpoint", "log_with", "log_interval", "checkpoint_hist", "recovery_interval"}
    | {"local_cache", "local_cache_size"}
)


def write_model_card(student: TrainedStudent, folder: Path) -> None:
    """Write the ``README.md`` of a Hugging Face repository, and its picture of the curves.

    Raises:
        DataError: The run's ``summary.csv`` is damaged.
    """
    summary = student.checkpoint.parent / "summary.csv"
    rows = read_summary(summary) if summary.is_file() else []
    if rows:
        _plot(rows, folder / _CURVES_FILE)
    (folder / "README.md").write_text(model_card(student, rows), encoding="utf-8")


def model_card(student: TrainedStudent, rows: Sequence[Mapping[str, float]] = ()) -> str:
    """Return the text of the card, with its metadata block.

    Args:
        student: Student loaded from a checkpoint.
        rows: Rows of the run's ``summary.csv``.
    """
    spec, state = student.spec, student.state
    metrics: Mapping[str, Any] = state.get("metrics", {})
    height, width = spec.img_size
    task = "image-classification" if spec.num_classes else "image-feature-extraction"
    classes = f"with {spec.num_classes:,} classes" if spec.num_classes else "without a classifier"
    lines = [
        "---",
        ModelCardData(library_name="timm", tags=[task, "timm", "knowledge-distillation"]).to_yaml(),
        "---",
        "",
        f"# {markdown(spec.architecture, limit=MAX_CELL)}, {_origin(state)}",
        "",
        f"A {markdown_code(spec.architecture, limit=MAX_CELL)} {classes}"
        f" for images of {height} x {width} pixels, trained with scalekd{_version(state)}.",
        "",
        "```python",
        *filter(None, [import_for(spec.architecture)]),
        "import timm",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        'backbone = timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True'
        f"{_any_size(spec.architecture)})",
        "```",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {markdown(value)} |" for name, value in _rows(student, metrics)),
        *_curves(rows),
        *_settings(state),
        "",
    ]
    return "\n".join(lines)


def _any_size(architecture: str) -> str:
    """Return the arguments for maps of images of any size, channels first, as text."""
    arguments = backbone_arguments(architecture)
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def _curves(rows: Sequence[Mapping[str, float]]) -> list[str]:
    if not rows:
        return []
    columns = {"epoch": "epoch", "samples_viewed": "views", "train_loss": "training loss"}
    columns |= _TOP1
    shown = [name for name in columns if any(name in row for row in rows)]
    chosen = sorted({round(i * (len(rows) - 1) / (_NUM_ROWS - 1)) for i in range(_NUM_ROWS)})
    return [
        *("", "## Curves", "", f"![Training loss and top-1 by epoch]({_CURVES_FILE})", ""),
        "| " + " | ".join(columns[name] for name in shown) + " |",
        "| " + " | ".join("---" for _ in shown) + " |",
        *(
            "| " + " | ".join(_cell(name, rows[number].get(name)) for name in shown) + " |"
            for number in chosen
        ),
    ]


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    if column == "epoch":
        return str(int(value) + 1)
    return f"{value:,.0f}" if column == "samples_viewed" else f"{value:.4g}"


def _settings(state: Mapping[str, Any]) -> list[str]:
    settings = state.get("settings")
    if not settings:
        return []
    kept = {name: value for name, value in settings.items() if name not in _OF_THE_MACHINE}
    text = dump_plain(kept).rstrip()
    shown = [printable(line) for line in text.splitlines()[:_MAX_SETTINGS]]
    fence = markdown_fence(text)
    return ["", "## Settings", "", f"{fence}yaml", *shown, fence]


def _plot(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, columns in ((left, {"train_loss": "training loss"}), (right, _TOP1)):
        for column, label in columns.items():
            points = [(int(row["epoch"]) + 1, row[column]) for row in rows if column in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
                axes.legend(frameon=False)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _origin(state: Mapping[str, Any]) -> str:
    if state.get("objective") not in (None, "none") and state.get("teacher"):
        return f"distilled from {markdown(state['teacher'], limit=MAX_CELL)}"
    return "trained without a teacher"


def _version(state: Mapping[str, Any]) -> str:
    version = state.get("software", {}).get("scalekd")
    return f" {markdown(version, limit=MAX_CELL)}" if version else ""


def _rows(student: TrainedStudent, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    state, spec = student.state, student.spec
    rows = [("objective", state.get("objective"))]
    if state.get("objective") not in (None, "none"):
        rows += [
            ("teacher", state.get("teacher")),
            ("teacher's weights, SHA-256", state.get("teacher_weights_sha256")),
            ("licence of the teacher's weights", state.get("teacher_licence") or _NOT_RECORDED),
            ("note of the cache's maker", state.get("teacher_note")),
            ("logits of", _several(state)),
            ("cache, fingerprint", state.get("cache_id")),
        ]
    rows += [
        ("recipe", Path(state.get("settings", {}).get("recipe") or "").name),
        ("training images, fingerprint", state.get("data_fingerprint")),
        ("licence of the training images", state.get("data_licence") or _NOT_RECORDED),
        ("views seen in training", f"{int(state['samples_viewed']):,}"),
        ("epochs", state["epoch"]),
        ("mean, std", f"{_numbers(spec.mean)}, {_numbers(spec.std)}"),
        ("evaluated with", f"resize filter {spec.interpolation}, crop_pct {spec.crop_pct:g}"),
    ]
    for name, (label, unit) in (SCORES | {"eval_num_samples": ("validation images", "")}).items():
        if name in metrics:
            rows.append((label, f"{metrics[name]:,.6g}{unit}"))
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _several(state: Mapping[str, Any]) -> str | None:
    """Return the teachers of the logits, if they differ from the teacher of the features."""
    models = state.get("logits_of", [])
    return None if models == [state.get("teacher")] else ", ".join(models)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
