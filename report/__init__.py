"""What came of runs, shown: knows their folders, and nothing of how they are trained."""
