"""Files, JSON, errors, digests, hardware and process settings, shared by the whole package.

Imports no other subpackage.
"""
