"""The whole objective: every loss, and the gradient of their sum at the student and projectors."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scalekd.distillation import (
    FullLogits,
    ScaleKDConfig,
    ScaleKDObjective,
    StageConfig,
    Targets,
)

if TYPE_CHECKING:
    from tests.conformance.conftest import Golden, GoldenFolder

KIND = "full"
_LOSSES = {
    "ori_loss": "task_loss",
    "loss_kd": "kd_loss",
    "loss_s3": "stage3_spatial_loss",
    "loss_s3_alt": "stage3_frequency_loss",
    "loss_s4": "stage4_spatial_loss",
    "loss_s4_alt": "stage4_frequency_loss",
    "total": "total",
}
_PROJECTORS = {
    "stage3_spatial": ("loss_fmd_s3.projector_0.", "mid/s3_cap_spat"),
    "stage3_frequency": ("loss_fmd_s3.projector_1.", "mid/s3_cap_freq"),
    "stage4_spatial": ("loss_fmd_s4.projector_0.", "mid/s4_cap_spat"),
    "stage4_frequency": ("loss_fmd_s4.projector_1.", "mid/s4_cap_freq"),
}
_TASKS = {"ce": ("cross_entropy", 0.0), "ls": ("cross_entropy", 0.1), "bce": ("bce", 0.0)}
_STORED_IN_HALF = 2e-3


def test_the_objective_equals_the_reference(
    golden: "Golden", golden_folder: "GoldenFolder", dtype: torch.dtype, tmp_path: Path
) -> None:
    exact = _Run(golden, golden_folder, torch.float64, tmp_path)
    run = exact
    if dtype != torch.float64:
        run = _Run(golden, golden_folder, dtype, tmp_path, same_side_as=exact)

    # Published label smoothing and BCE build float32 targets even in the float64 run.
    loose = 1e-6 if golden.meta["task"] != "ce" and dtype == torch.float64 else None
    for theirs in [*golden.meta["loss_keys"], "total"]:
        ours = _LOSSES[theirs]
        if ours in run.losses:
            golden.assert_value(run.losses.pop(ours), f"loss/{theirs}", loose)
        else:
            assert golden.arrays[f"loss/{theirs}"] == 0, f"{theirs} was not computed"
    assert not run.losses, f"the golden file lacks {set(run.losses)}"

    for index, level in enumerate(run.levels, start=3):
        golden.assert_gradient(level, f"grad/feat_s{index}")
    golden.assert_gradient(run.logits, "grad/logit_s")

    for name, (prefix, tap) in _PROJECTORS.items():
        if name in run.objective.projectors:
            golden.assert_projector(run.objective.projectors[name], prefix)
            golden.assert_value(run.taps[name], tap, _STORED_IN_HALF)
        else:
            assert all(not gradient.any() for gradient in golden.below(f"grad/w/{prefix}").values())
    views = [view for view in ("spatial", "frequency") if f"stage3_{view}" in run.taps]
    for view, final in zip(views, run.taps["tail"].chunk(len(views)), strict=True):
        golden.assert_value(final, f"mid/s3_stage_{view[:4]}", _STORED_IN_HALF)

    assert run.objective.tail is not None
    assert all(parameter.grad is None for parameter in run.objective.tail.parameters())


class _Run:
    def __init__(
        self,
        golden: "Golden",
        folder: "GoldenFolder",
        dtype: torch.dtype,
        tmp_path: Path,
        same_side_as: "_Run | None" = None,
    ) -> None:
        inputs, weights = folder.teacher_files(golden.meta["teacher"])
        assert weights, f"no weights of teacher {golden.meta['teacher']} in the folder"
        teacher = folder.load_teacher(weights[0], inputs, tmp_path).to(dtype)
        with torch.no_grad():
            said = teacher(inputs.tensor("in/image_u8"))

        self.levels = [golden.leaf("in/feat_s3", dtype), golden.leaf("in/feat_s4", dtype)]
        self.logits = golden.leaf("in/logit_s", dtype)
        self.objective = ScaleKDObjective(
            _config(golden),
            student_levels=[(x.shape[1], (x.shape[2], x.shape[3])) for x in self.levels],
            teacher_stages=teacher.spec.stages,
            tail=teacher.tail(),
        )
        for name, projector in self.objective.projectors.items():
            golden.load_projector(projector, _PROJECTORS[name][0])
        self.objective.to(dtype).train(golden.meta["mode"] == "train")
        self.relu_inputs = golden.relu_inputs(self.objective)
        if same_side_as is not None:
            self.relu_inputs.pin_to(same_side_as.relu_inputs)
        self.taps: dict[str, torch.Tensor] = {}
        modules = {**self.objective.projectors, "tail": self.objective.tail}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda module, inputs, output, name=name: self.taps.update({name: output})
            )

        targets = Targets(features=said.features[4], logits=FullLogits(said.logits))
        self.losses = self.objective(self.levels, self.logits, golden.tensor("in/labels"), targets)
        self.losses["total"].backward()


def _config(golden: "Golden") -> ScaleKDConfig:
    meta = golden.meta
    stages = {
        stage: StageConfig(
            spatial_weight=meta[stage]["alpha"][0],
            frequency_weight=meta[stage]["alpha"][1],
            num_heads=meta[stage]["num_heads"],
            softmax_scale=tuple(meta[stage]["softmax_scale"]),
        )
        for stage in ("s3", "s4")
    }
    task, label_smoothing = _TASKS[meta["task"]]
    has_batch_norm = bool(golden.below("buf_before/"))
    return ScaleKDConfig(
        stage3=stages["s3"],
        stage4=stages["s4"],
        kd=meta["kd"]["use"],
        kd_alpha=meta["kd"]["alpha"],
        temperature=meta["kd"]["temp"],
        task=task,
        label_smoothing=label_smoothing,
        norm="batch" if has_batch_norm else "layer",
    )
