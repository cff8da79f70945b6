"""What a trained model is asked: held-out loss, ablations, gates, use of the memory."""
