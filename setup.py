"""Tells `pip install .` that this is a repository to clone."""

raise SystemExit(
    "nanohydra cannot be installed: its packages `data` and `model` would collide with your own. "
    "Clone the repository and put its folder on PYTHONPATH.")
