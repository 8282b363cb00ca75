"""The head ops beside their peers: time, memory, correctness, tile tuning. One file a command."""
