"""``scalekd export``."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import emit

_MAX_SIDE = 8192


class _Size(click.ParamType[Any]):
    """``384``, ``512,640`` or ``512x640`` (height first), or ``any``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "any":
            return value
        match = re.fullmatch(r"(\d{1,5})(?:[x,](\d{1,5}))?", str(value))
        sides = () if match is None else tuple(int(side or match[1]) for side in match.groups())
        if not sides or not all(1 <= side <= _MAX_SIDE for side in sides):
            self.fail(
                f"{value!r} is no size; give a side such as 384, height and width such as 512x640 "
                f"(each from 1 to {_MAX_SIDE}), or any",
                param,
                ctx,
            )
        return sides


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
@click.option(
    "--img-size",
    type=_Size(),
    help="Height and width of the images of an ONNX file in pixels, as 384 or 512x640, or `any` "
    "for a file that accepts images of all sizes.  [default: the student's]",
)
@click.option(
    "--features",
    is_flag=True,
    help="Return feature maps as well from an ONNX file, as outputs features_0 (the finest), "
    "features_1, and so on, for detection and segmentation.",
)
@json_option
def command(
    run: Path,
    output: Path,
    *,
    export_format: str,
    use_ema: bool,
    img_size: Any,
    features: bool,
    as_json: bool,
) -> None:
    """Write the best student of the training run RUN, or of a checkpoint folder inside it.

    The written model is opened again and its outputs are compared with the student's: they must be
    identical, or for ONNX within 1e-4 of the largest value.
    """
    from scalekd.models.architectures import import_for
    from scalekd.pipelines.export import export

    result = export(
        run,
        output,
        export_format=export_format,  # type: ignore[arg-type]
        use_ema=use_ema,
        img_size=img_size,
        features=features,
    )
    check = "outputs identical when opened with timm"
    if export_format == "onnx":
        check = f"outputs within {result.difference:.1g} of the largest when run by onnxruntime"
    classes = f"{result.num_classes} classes" if result.num_classes else "no classifier"
    lines = [
        f"{result.output}: {result.architecture}, {result.num_parameters:,} parameters, "
        f"{classes}; {check}"
    ]
    if result.feature_channels is not None:
        widths = ", ".join(str(width) for width in result.feature_channels)
        lines.append(f"as a backbone (features_only=True): maps of {widths} channels")
    needed = import_for(result.architecture)
    if needed is not None and export_format in ("timm", "hf"):
        lines.append(f"timm has no {result.architecture}: `{needed}` before opening it")
    emit(asdict(result), lines, as_json=as_json)
