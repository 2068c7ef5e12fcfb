"""A whole Swin teacher from its image: features of both stages, logits, and its own tail."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.conformance.conftest import Golden, GoldenFolder

KIND = "teacher"
_TOLERANCE = 1e-5  # these outputs were stored from a float32 run only


def test_the_teacher_equals_the_reference(
    golden: "Golden", golden_folder: "GoldenFolder", dtype: torch.dtype, tmp_path: Path
) -> None:
    inputs, all_weights = golden_folder.teacher_files(golden.meta["tag"])
    assert all_weights, f"no weights of teacher {golden.meta['tag']} in the folder"
    for weights in all_weights if golden.meta["part"] == "io" else [golden]:
        teacher = golden_folder.load_teacher(weights, inputs, tmp_path).to(dtype)

        output = teacher(inputs.tensor("in/image_u8"))

        for stage in (3, 4):
            grid = teacher.spec.stages[stage].grid
            maps = output.features[stage].transpose(1, 2).unflatten(2, grid)
            inputs.assert_value(maps, f"out/feat_s{stage}", _TOLERANCE)
        inputs.assert_value(output.logits, "out/logits", _TOLERANCE)

        tail = teacher.tail().to(dtype)
        final = tail(output.features[3])
        torch.testing.assert_close(final, output.features[4])
        torch.testing.assert_close(tail.head(final), output.logits)
