"""A slim trainer for reinforcement-learning fine-tuning with AGRO: the command `agro`."""
