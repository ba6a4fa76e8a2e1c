"""`python -m fewstep.cli`."""

from fewstep.cli.main import main

main()
