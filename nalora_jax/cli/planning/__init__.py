"""Plans of ``nalora plan``: the compiled step for hardware that is not attached, and its report."""
