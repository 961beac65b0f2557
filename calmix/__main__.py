"""`python -m calmix` is the command line."""

from calmix.cli import main

main()
