"""Measure trained models: the loss on a text, and the accuracy on standard tasks."""
