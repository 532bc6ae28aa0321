"""Files, JSON, errors, digests, settings of a process: what every room may use.

Imports no other room.
"""
