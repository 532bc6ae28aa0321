"""Multiple hosts and devices: rendezvous, meshes, shardings, agreement between hosts.

Imports `utils`.
"""
