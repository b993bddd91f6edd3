"""Rollouts on OpenAI-compatible servers, which load each version of the adapter by name.

client     one server: completions by token ids, and adapters by name
versions   the adapter of a step as a folder that servers load
proof      whether a server answers as a version of the adapter
received   the samples that servers sent, stored for a resumed run
pool       all servers: loads, proves, asks, repeats and drops
"""
