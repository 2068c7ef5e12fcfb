"""timm models by name: construction with checked arguments, and safe reading of weights."""
