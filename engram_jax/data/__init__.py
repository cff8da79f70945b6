"""From documents to batches, in this order: sources, corpus, packing, mixture, pipeline."""
