"""Scores: how much each choice of each site damages a network, before any policy is tried as a whole."""
