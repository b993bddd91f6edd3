"""Turns records into batches: sources, chat templates, packing and the checkpointable pipeline.

This package never imports models.
"""
