"""The head ops on the native CPU kernels of csrc."""
