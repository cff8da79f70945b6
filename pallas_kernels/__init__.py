"""Kernels, one folder each: an API, a reference that defines it, and its implementations."""
