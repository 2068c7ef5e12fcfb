"""The model card of an exported student: what it is, where it came from, what it reached.

Everything on it is read from the checkpoint; what the run did not record is not on the card.
"""

from collections.abc import Mapping
from typing import Any

from scalekd.training.trained import TrainedStudent


def model_card(student: TrainedStudent) -> str:
    """README.md of a Hugging Face repository, with its metadata block."""
    spec, state = student.spec, student.state
    metrics: Mapping[str, Any] = state.get("metrics", {})
    height, width = spec.img_size
    lines = [
        "---",
        "library_name: timm",
        "tags:",
        "- image-classification",
        "- timm",
        "- knowledge-distillation",
        "---",
        "",
        f"# {spec.architecture}, {_origin(state)}",
        "",
        f"A `{spec.architecture}` with {spec.num_classes:,} classes for images of {height} x "
        f"{width} pixels, trained with scalekd{_version(state)}.",
        "",
        "```python",
        "import timm",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        'backbone = timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)',
        "```",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _rows(student, metrics)),
        "",
    ]
    return "\n".join(lines)


def _origin(state: Mapping[str, Any]) -> str:
    if state.get("objective") not in (None, "none") and state.get("teacher"):
        return f"distilled from {state['teacher']}"
    return "trained without a teacher"


def _version(state: Mapping[str, Any]) -> str:
    version = state.get("software", {}).get("scalekd")
    return f" {version}" if version else ""


def _rows(student: TrainedStudent, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    state, spec = student.state, student.spec
    rows = [("objective", state.get("objective"))]
    if state.get("objective") not in (None, "none"):
        rows += [
            ("teacher", state.get("teacher")),
            ("teacher's weights, SHA-256", state.get("teacher_weights_sha256")),
            ("licence of the teacher's weights", state.get("teacher_licence")),
            ("note of the cache's maker", state.get("teacher_note")),
            ("logits of", _several(state)),
            ("cache", state.get("cache_id")),
        ]
    rows += [
        ("training images, fingerprint", state.get("data_fingerprint")),
        ("views seen in training", f"{int(state['samples_viewed']):,}"),
        ("epochs", state["epoch"]),
        ("mean, std", f"{_numbers(spec.mean)}, {_numbers(spec.std)}"),
    ]
    for name, label, unit in (
        ("eval_top1", "top-1", " %"),
        ("eval_top5", "top-5", " %"),
        ("ema_eval_top1", "top-1 of the averaged weights", " %"),
        ("eval_num_samples", "validation images", ""),
    ):
        if name in metrics:
            rows.append((label, f"{metrics[name]:,.6g}{unit}"))
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _several(state: Mapping[str, Any]) -> str | None:
    """The teachers whose logits were learnt from, unless it was the teacher of the features."""
    models = state.get("logits_of", [])
    return None if models == [state.get("teacher")] else ", ".join(models)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
