"""Plots and the HTML report, from logged metrics only; table and plot of ``nalora inspect``."""
