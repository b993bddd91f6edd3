"""Loads models by name: a base, a base with its adapter, or a dual encoder."""
