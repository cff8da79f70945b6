"""Kernels. Each has a folder with its API, a reference implementation, and faster ones."""
