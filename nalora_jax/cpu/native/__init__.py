"""Native kernels for bf16 matmuls, attention and losses that XLA calls on a CPU; sums are float32.

At the shapes of a training step XLA:CPU's matmuls reach half of the throughput of matrix tiles
(AMX) and two thirds of AVX2's. With the dot products of AVX512-BF16 they are fast, but adapters and
roundings take separate passes. Its attention passes over every score several times.
The C++ sources in this folder are compiled on first use, if the CPU has one of these instruction
sets and a C++ compiler is installed, and stored in the cache. Otherwise, and with
``NALORA_NATIVE=0``, XLA does the work.
"""
