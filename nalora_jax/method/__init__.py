"""NA-LoRA, whole: equations, statistics, rules, the optax transform, adapters and one training
step.

    activations   phi(z) = rho(z) z: formulas, homogeneity, regions, registration
    low_rank      s (x A) B with the gated gradient of A
    statistics    the compensation identity, the table of statistics, and `observe`, their way out
    measurement   the sample of positions that a block measures, and the checks of a live step
    rules         averages of statistics -> one factor for each channel
    transform  `scale_by_gates` and `nalora`: the averages and the factors around an optax optimizer
    ffn           the gated feed-forward blocks of this library's models
    adapt         adapters around models of Flax Linen and NNX
    step          one training step of the trainer

Read `rules`, `transform` and `low_rank` first. The package contains no code for a particular
platform: implementations register themselves for the operations that it defines.
"""
