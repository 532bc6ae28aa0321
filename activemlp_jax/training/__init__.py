"""The training program: config, optimizer, step, loop, checkpoints, reporting.

Imports `tasks` and everything that `tasks` may import.
"""
