"""The training program: config, recipes, optimizer, step, loop, checkpoints, reporting.

Imports `tasks`, `plots`, and all that these may import.
"""
