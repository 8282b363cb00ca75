"""What answers the model's turns: `environment=module:Class`, see docs/environments.md.

The protocol is in `environment.py`. An environment of the user's own needs nothing here.
"""
