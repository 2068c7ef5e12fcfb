"""Damage, mutations and SIGKILL, applied to real caches; tests run short forms of each."""
