"""Run folders: locks, checkpoints, logs, remote copies, exports, and the parts of a run that use them."""
