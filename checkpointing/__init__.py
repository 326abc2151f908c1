"""Run folders, checkpoints, and the training state that they restore."""
