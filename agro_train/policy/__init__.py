"""The model in training and its reference: loading, adapters, log-probabilities, checkpoints."""
