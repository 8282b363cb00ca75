"""What `agro` does, one file a command: its arguments, and beside them what it does with them.

`agro_train.cli` imports the file of the command that is asked for, and no other.
"""
