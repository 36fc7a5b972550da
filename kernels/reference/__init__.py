"""The operators in plain torch: what each computes, and what it costs at least. Runs wherever torch does."""
