"""Export of trained students to other programs: timm and ONNX files, with a model card."""

from scalekd.export.backbone import check_weights, load_backbone
from scalekd.export.timm import Exported, ExportFormat, export_student

__all__ = ["ExportFormat", "Exported", "check_weights", "export_student", "load_backbone"]
