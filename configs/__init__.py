"""Named runs, one file each: `python train.py NAME`."""
