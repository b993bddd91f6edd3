"""Training runs: assembly, the training loop, checkpoints, logging and export."""
