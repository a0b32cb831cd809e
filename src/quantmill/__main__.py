"""`python -m quantmill`."""

from quantmill.cli import main

main()
