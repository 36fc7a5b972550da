"""The ledger: schema, migrations, transactions, the front, queries. Imports nothing of archfront but its errors."""
