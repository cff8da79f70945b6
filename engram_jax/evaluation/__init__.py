"""Evaluation of a trained model: held-out loss, ablations, gates, statistics of the memory."""
