"""Trained students for other programs: timm and ONNX files, and the model card beside them."""

from scalekd.export.backbone import check_weights, load_backbone
from scalekd.export.timm import Exported, ExportFormat, export_student

__all__ = ["ExportFormat", "Exported", "check_weights", "export_student", "load_backbone"]
