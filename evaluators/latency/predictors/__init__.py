"""Latency predictors: one interface, from exact tables to transfer from known devices."""
