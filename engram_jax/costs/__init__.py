"""What a configuration costs, before it runs: counted, and compiled ahead of time."""
