"""What survives a process: run folders, checkpoints and their state."""
