"""Plots and the HTML report, from logged metrics only; table and plot of ``nalora inspect``."""

from nalora_jax.report.html import write_report
from nalora_jax.report.inspect import LayerSummary, layer_summary, layer_table, save_picture

__all__ = ["LayerSummary", "layer_summary", "layer_table", "save_picture", "write_report"]
