"""Many runs in one program: adapters, optimizer states and batches with a leading axis ``[runs]``.

The frozen base has no such axis, so all runs on a device share one copy and one read of it.

    grid      the configs of ``--sweep`` options
    groups    runs that share a program
    values    values in which the runs of a program differ
    stack     states of runs, padded to common ranks and stacked
    program   the compiled step of several runs
    loop      the training loop over several runs
    run       `nalora_jax.sweep`: run folders, checkpoints, evaluation and export of every run
"""
