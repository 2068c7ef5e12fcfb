"""Copying a cache, or a part of it, between locations; and the card of a shared cache."""
