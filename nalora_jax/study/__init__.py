"""Paired comparisons of training methods: a protocol file, one record per run, statistics and a report.

protocol.toml -> plan (which runs are wanted now) -> execution -> records.jsonl -> report (tables and pictures)
"""
