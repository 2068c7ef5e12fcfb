"""Offline teacher-feature caches and ScaleKD student training.

Importing this package loads no torch; import the packages you need, such as
``scalekd.distillation`` or ``scalekd.cache``.
"""

__version__ = "0.2.0"
