"""Jobs, strategies, the loop and its execution."""
