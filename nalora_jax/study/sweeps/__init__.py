"""Many runs in one program: adapters, optimizer states and batches with a leading axis ``[runs]``.

The frozen base has no such axis, so all runs on a device share one copy and one read of it.

    grid      the configs of ``--sweep`` options
    values    runs that share a program, and the values in which they differ
    fit       the mesh of a program and the number of its runs, by memory
    program   stacked states, the compiled step and the training loop of several runs
    run  `nalora_jax.sweep`: run folders, checkpoints, evaluation, export and comparison of all runs
"""
