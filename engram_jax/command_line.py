"""Command lines: a named configuration with every field as a flag."""
