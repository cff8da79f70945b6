"""The paper's figures at our scale, and their controls: one file a figure, on `sweep.py`."""
