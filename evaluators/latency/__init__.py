"""Latency: the measurement discipline, devices, per-block tables, and the evaluator that uses them."""
