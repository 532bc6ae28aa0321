"""Several hosts and devices: how hosts meet and leave, meshes, shardings, agreement.

Imports `utils`.
"""
