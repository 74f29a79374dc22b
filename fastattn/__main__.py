"""`python -m fastattn` is the `fastattn` command."""

from fastattn.cli import main

main()
