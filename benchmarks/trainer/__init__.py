"""Whole models and training steps, beside TRL's."""
