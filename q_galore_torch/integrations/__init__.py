"""Bridges to other libraries: ``distributed`` for many processes."""
