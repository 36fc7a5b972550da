"""Compressing a model and measuring what it costs: recovery, and the evaluators built on it."""
