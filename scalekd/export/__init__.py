"""Trained students for other programs: timm and ONNX files, and the model card beside them."""

from scalekd.export.timm import Exported, ExportFormat, export_student

__all__ = ["ExportFormat", "Exported", "export_student"]
