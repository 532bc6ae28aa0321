"""The same networks in PyTorch, to compare with; needs the extra `torch`.

Imports no other room.
"""
