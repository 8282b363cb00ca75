"""Functions from completions to numbers. A new built-in reward is one file here."""
