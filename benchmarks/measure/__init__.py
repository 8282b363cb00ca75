"""What every benchmark needs: clocks and memory, shapes, rows of a CSV, plots."""
