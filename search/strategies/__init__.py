"""What to try next: one module for each strategy."""
