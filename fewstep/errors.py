"""Errors about what a user wrote or provided; the command line alone turns them into an exit code.

Any other exception that leaves the package is a fault of the package.
"""


class FewstepError(ValueError):
    """Wrong input of a user, as `key: found X; expected Y. hint`.

    Args:
        key: name of the setting, option or file that is wrong, as the user wrote it.
        found: what it is; an empty string leaves this part of the message out.
        expected: what it has to be; an empty string leaves this part of the message out.
        hint: what to do, as one or more sentences without the last full stop.
    """

    def __init__(self, key: str, found: object, expected: object, hint: str | None = None) -> None:
        self.key, self.found, self.expected, self.hint = key, found, expected, hint
        parts = [f"found {found}" if found != "" else "", f"expected {expected}" if expected != "" else ""]
        self.message = f"{key}: " + "; ".join(filter(None, parts)) + (f". {hint}" if hint else "")
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def under(self, section: str) -> "FewstepError":
        """The same error about a key of a section."""
        return type(self)(f"{section}.{self.key}", self.found, self.expected, self.hint)

    def __reduce__(self) -> tuple[type["FewstepError"], tuple[object, ...]]:
        """Make it survive the way from one process to another."""
        return type(self), (self.key, self.found, self.expected, self.hint)


class MissingError(FewstepError, FileNotFoundError):
    """A file, folder, model or data set that does not exist on this machine."""
