"""What ``test_calibration_processes`` runs under ``torchrun``; notes go to ``NOTES/<rank>.json``.

torchrun --nproc-per-node 3 calibration_script.py IMAGES OUTPUT NOTES [skip] [die]

With ``skip`` corrupt images are skipped; with ``die`` process 1 ends at its second batch.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from scalekd.errors import ScaleKDError
from scalekd.pipelines import _calibrate, _calibration_views
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.teachers import TeacherConfig

NUM_CLASSES = 10


def config(images: str, output: str, *, skip_corrupt: bool = True) -> CacheTeacherConfig:
    teacher = TeacherConfig(
        model="test_vit",
        pretrained=False,
        img_size=32,
        model_kwargs={"num_classes": NUM_CLASSES},
    )
    return CacheTeacherConfig(
        teacher=teacher,
        data_dir=images,
        output=Path(output),
        aug="crop+flip",
        codec="transform:error=0.05",
        batch_size=8,
        shard_size=30,
        workers=1,
        skip_corrupt=skip_corrupt,
    )


def main() -> None:
    images, output, notes = sys.argv[1:4]
    views: list[int] = []
    stages: list[int] = []
    run, fit = _calibration_views.run_teacher, _calibrate.fit_codec

    def counted(teacher: Any, pixels: Any, precision: str) -> Any:
        views.append(len(pixels))
        if "die" in sys.argv and os.environ["RANK"] == "1" and len(views) == 2:
            os._exit(9)
        return run(teacher, pixels, precision)

    def noted(request: Any, shape: Any, calibration: Any, **named: Any) -> Any:
        stages.append(shape.num_prefix_tokens + shape.num_patch_tokens)
        return fit(request, shape, calibration, **named)

    _calibration_views.run_teacher = counted
    _calibrate.fit_codec = noted
    error = None
    try:
        cache_teacher(config(images, output, skip_corrupt="skip" in sys.argv))
    except ScaleKDError as fault:
        error = f"{type(fault).__name__} {fault.exit_code} {fault}"
    path = Path(notes) / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps({"views": views, "fits": len(stages), "error": error}))


if __name__ == "__main__":
    main()
