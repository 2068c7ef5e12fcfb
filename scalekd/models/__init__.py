"""timm models by name: construction with checked arguments, and weights read without pickles."""
