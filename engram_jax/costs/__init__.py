"""The costs of a configuration before it runs: by counting, and by compiling ahead of time."""
