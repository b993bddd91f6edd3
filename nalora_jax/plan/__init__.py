"""Planning a run for hardware that is not there: what its compiled step needs and how fast it can be."""
