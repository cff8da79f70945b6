"""Cached generation and scoring: state, weights, the loop, and how a token is drawn."""
