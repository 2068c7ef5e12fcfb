"""Copies of caches, or of parts of caches, between locations; the card of a shared cache."""
