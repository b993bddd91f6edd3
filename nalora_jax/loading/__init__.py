"""Trained runs and adapters: where they are, and their models with weights."""
