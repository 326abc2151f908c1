"""Reports of runs, from the files in their folders: tables, curves and importance on one page."""
