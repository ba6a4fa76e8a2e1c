"""`python -m fewstep`."""

from fewstep.cli.main import main

main()
