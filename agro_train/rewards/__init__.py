"""Functions from completions to numbers.

A new built-in reward is one file here: a subclass of `reward.Reward`, of which `number.py` is the
shortest example, and an entry in `functions.BUILT_IN`. Nothing else knows the built-in rewards by
name. The checks of the dataset, the majority vote of `agro eval` and the messages ask the class.

A user's own function needs nothing here: `reward=module:function`, see docs/rewards.md.
"""
