"""Paired comparisons of training methods: protocol file, records, statistics and report.

protocol.toml -> plan (runs to do now) -> execution -> records.jsonl -> report
"""
