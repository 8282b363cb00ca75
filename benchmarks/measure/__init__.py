"""What the benchmarks share: timing and memory, turns, shapes, CSV rows, chart styles."""
