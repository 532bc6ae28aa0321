"""The training program: config, recipes, optimizer, step, loop, checkpoints, reporting.

Imports `tasks`, and all that these may import.
"""
