"""Without the device: what the compiler makes of the kernels, what datasheets predict."""
