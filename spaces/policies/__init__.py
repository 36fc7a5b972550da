"""Compression policies: which parts of a model may be changed, and what becomes of it."""
