"""Who computes log-probabilities from hidden states: a file a peer, listed in `registry.py`."""
