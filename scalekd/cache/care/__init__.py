"""Verification and repair of a cache."""
