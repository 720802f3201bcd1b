"""`python -m devboxd.cli`."""

from devboxd.cli import main

main()
