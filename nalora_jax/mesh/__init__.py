"""The mesh of a run: its processes and devices, and the rules that shard arrays over them."""
