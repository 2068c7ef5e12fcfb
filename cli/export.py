"""``scalekd export``."""

from dataclasses import asdict
from pathlib import Path

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import emit


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder or file to write, which must not exist.",
)
@click.option(
    "--format",
    "export_format",
    default="timm",
    show_default=True,
    type=click.Choice(["timm", "hf", "safetensors", "onnx"]),
    help="timm: a folder for timm.create_model('local-dir:DIR', pretrained=True); hf: the same "
    "with a model card; safetensors: the bare weights; onnx: one file for onnxruntime and others.",
)
@click.option("--use-ema", is_flag=True, help="Export the averaged (EMA) weights.")
@json_option
def command(run: Path, output: Path, *, export_format: str, use_ema: bool, as_json: bool) -> None:
    """Write the best student of the training run RUN, or of a checkpoint folder inside it.

    The written model is opened again and its outputs are compared with the student's: they must be
    identical, or for ONNX within 1e-4 of the largest logit.
    """
    from scalekd.models.architectures import import_for
    from scalekd.pipelines.export import export

    result = export(run, output, export_format=export_format, use_ema=use_ema)  # type: ignore[arg-type]
    check = "outputs identical when opened with timm"
    if export_format == "onnx":
        check = f"logits within {result.difference:.1g} of the largest when run by onnxruntime"
    lines = [
        f"{result.output}: {result.architecture}, {result.num_parameters:,} parameters, "
        f"{result.num_classes} classes; {check}"
    ]
    if result.feature_channels is not None:
        widths = ", ".join(str(width) for width in result.feature_channels)
        lines.append(f"as a backbone (features_only=True): maps of {widths} channels")
    needed = import_for(result.architecture)
    if needed is not None and export_format in ("timm", "hf"):
        lines.append(f"timm has no {result.architecture}: `{needed}` before opening it")
    emit(asdict(result), lines, as_json=as_json)
