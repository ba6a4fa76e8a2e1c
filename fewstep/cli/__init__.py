"""The command `fewstep`: parsing only; the work is done in the packages below."""
