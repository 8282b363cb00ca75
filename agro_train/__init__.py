"""A slim trainer for reinforcement-learning fine-tuning with AGRO; `agro train` on the command line."""
