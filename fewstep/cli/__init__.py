"""The command `fewstep`: parsing only; the work is done in the packages below.

`main` has the parser, `commands` the list of commands, and each command a file of its own: `train`, `export`, `recipes`,
`plan`, `cache`, `evaluate`, `reference`, `compare`, `report`. `scripts` is what the files in `train/` call; `options` and
`protocol` are options that several commands share. Only `fewstep.__main__` imports this package. A FewstepError ends here, as
one sentence and exit status 1.
"""
