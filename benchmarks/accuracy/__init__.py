"""Does it teach: students trained from a cache, with everything else held equal."""
