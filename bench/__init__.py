"""Everything that measures nanohydra beside a peer: `python -m bench NAME`."""
