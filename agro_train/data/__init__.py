"""Where completions to learn from come from: prompts, rows, recorded files, the mix, the batch.

A new source of prompts is a function in `tasks.py` or `sources.py`.
"""
