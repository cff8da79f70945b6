"""From documents on disk to batches: `sources`, `corpus`, `packing`, `mixture`, `pipeline`."""
