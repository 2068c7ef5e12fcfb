"""Command line: parse options, call one pipeline function, print its result."""
