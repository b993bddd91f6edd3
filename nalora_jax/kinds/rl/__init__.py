"""Runs with rewards."""
