"""Reading a cache: rows, extensions, and the choice of targets."""
