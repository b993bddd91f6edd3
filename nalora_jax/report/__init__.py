"""Plots and pages from logged metrics."""
