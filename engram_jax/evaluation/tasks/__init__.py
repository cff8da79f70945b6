"""Small tasks of lm-evaluation-harness, made from held-out documents of the shipped corpora."""
