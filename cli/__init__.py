"""Command line: parse, call one pipeline function, print."""
