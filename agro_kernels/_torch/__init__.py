"""The ops in blocked plain torch: for every device that has nothing faster, and for float64."""
