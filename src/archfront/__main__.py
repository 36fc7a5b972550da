"""``python -m archfront``."""

from archfront.cli.main import main

main()
