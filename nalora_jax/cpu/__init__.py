"""What exists because of a CPU: kernels in C++, the heap, huge pages, instruction sets."""
