"""Training: assembly, objectives, optimizers and the training loop."""
