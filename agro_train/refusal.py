"""What the command line shows as one sentence: a mistake of the user's, or of the user's files.

Any other exception is a bug and keeps its traceback.
"""


class Refusal(ValueError):
    """Names the argument, what was expected, what came, and what to do next."""
