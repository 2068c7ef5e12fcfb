"""Pipelines of the commands: each module is an end-to-end script composed from the library."""
