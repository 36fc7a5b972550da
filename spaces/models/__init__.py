"""Trained networks that policies compress."""
