"""Gather rows, with a backward pass that sums duplicates in an order the caller prepared."""

from pallas_kernels.hashed_gather.api import gather as gather
