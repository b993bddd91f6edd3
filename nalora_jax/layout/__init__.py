"""Planning of runs for absent hardware: memory, flops and speed of the compiled step."""
