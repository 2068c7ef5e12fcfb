"""A bounded check on one machine with a GPU; see ``python -m benchmarks.gpu --help``."""
