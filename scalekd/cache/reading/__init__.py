"""Reading a cache: rows, extensions, chosen targets."""
