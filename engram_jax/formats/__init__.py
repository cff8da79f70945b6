"""Checkpoints of other projects, read in place, and exports of our runs."""
