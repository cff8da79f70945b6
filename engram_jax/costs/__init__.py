"""The costs of a configuration before it runs: counted, traced, and compiled ahead of time."""
