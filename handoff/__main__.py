"""`python -m handoff`: the same as the command `handoff`."""

from handoff.cli import main

main()
