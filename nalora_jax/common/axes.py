"""Names of the axes of a mesh of devices; see `nalora_jax.layout.distributed`."""

AXES = ("data", "fsdp", "context", "tensor")
RUN = "run"
CONTEXT = "context"
BATCH_AXES = ("data", "fsdp")  # both split the rows of a batch; fsdp also splits weights
WEIGHT_AXES = ("fsdp", CONTEXT)  # both split weights, which are gathered layer by layer
