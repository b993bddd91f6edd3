"""Mesh, state, step, loop, checkpoints."""
