"""What train.py and sample.py can do without: `python -m scripts.NAME`."""
