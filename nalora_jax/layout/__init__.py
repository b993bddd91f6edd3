"""Meshes, shardings and layouts of a run over devices and hosts, with estimates of memory and
speed."""
