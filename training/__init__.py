"""Training: steps, optimizers, devices and records. Knows no model and no text."""
