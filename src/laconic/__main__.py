"""`python -m laconic`."""

from .cli import main

main()
