"""Files, logs, registries and trees: no module here knows what is trained."""
