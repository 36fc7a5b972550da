"""Allocators: how a budget is shared out among the sites of a policy."""
