"""Human-preference reward models.

`load` finds a reward by name, one of the package or of the user (`package.module:callable`); `image_reward` and `mps` are
networks without a library of their own; `files` names the files of weights and where to get them.
"""
