"""The training program: config, recipes, optimizer, step, loop, checkpoints, reporting.

Imports `tasks` and everything that `tasks` may import.
"""
