"""AGRO and the project's log-probabilities inside other people's trainers; one file each.

Each module imports its trainer's package, which is no dependency of this one.
"""
