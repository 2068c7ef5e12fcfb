"""Facts about student, teacher, images and software that the checkpoints of a run record."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd.students import Student
from scalekd.training import CachedTeacher, LabelledImages, TrainConfig, student_facts
from scalekd.training.plain_yaml import load_plain

Source = CachedTeacher | LabelledImages
"""Source of the training data of a student."""

_MAX_FRONT_MATTER = 64 << 10
_MAX_LICENCE = 200
_SOFTWARE = ("scalekd", "torch", "timm", "accelerate", "numpy", "pillow")


def run_facts(config: TrainConfig, source: Source, student: Student) -> Mapping[str, Any]:
    """Return the facts that every checkpoint of a run records."""
    return {
        **student_facts(student.spec, source.class_names if student.spec.num_classes else None),
        "settings": config.model_dump(mode="json"),
        "objective": config.objective,
        "online": config.online,
        **(source.facts if isinstance(source, LabelledImages) else _facts_of_teacher(source)),
        "data_licence": _licence_of_data(config.data_dir),
        "software": {name: importlib.metadata.version(name) for name in _SOFTWARE},
    }


def _facts_of_teacher(source: CachedTeacher) -> dict[str, Any]:
    plan = source.chosen.base.manifest.plan
    return {
        "teacher": ", ".join(spec.model for spec in source.feature_teachers.values()),
        "teacher_weights_sha256": ", ".join(
            spec.weights_sha256 for spec in source.feature_teachers.values()
        ),
        "teacher_licence": source.licence,
        "teacher_note": source.note,
        "logits_of": [teacher.model for teacher in source.logit_teachers],
        "cache_id": plan.cache_id,
        "data_fingerprint": plan.identity.data.fingerprint,
    }


def _licence_of_data(data_dir: str | None) -> str | None:
    """Return the licence in the Hugging Face card of a data set; ``None`` if it has none."""
    if data_dir is None:
        return None
    card = Path(data_dir) / "README.md"
    try:
        with card.open("rb") as file:
            opening, block, *_ = file.read(_MAX_FRONT_MATTER).decode().split("---\n", 2)
        metadata = load_plain(block) if not opening.strip() else None
    except (OSError, ValueError):
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and len(licence) <= _MAX_LICENCE else None
