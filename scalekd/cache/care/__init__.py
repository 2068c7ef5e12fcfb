"""Verification of a cache, and repair of what it reports."""
