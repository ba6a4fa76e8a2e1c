"""The check of shapes in signatures while tests run: jaxtyping's import hook calls `check` on every function."""

from collections.abc import Callable
from typing import TypeVar, get_args, get_origin, get_type_hints

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

PACKAGES = ("fewstep.diffusion", "fewstep.methods", "fewstep.teachers")

F = TypeVar("F", bound=Callable[..., object])


def spelled_out(annotation: object) -> object:
    """A named tuple, such as Prediction, as the tuple of its fields' types, so that these are checked.

    Not one that may be None: such are of other samples, as those that a reward asks for.
    """
    if isinstance(annotation, type) and issubclass(annotation, tuple) and annotation is not tuple:
        fields = [spelled_out(kind) for kind in get_type_hints(annotation).values()]
        return tuple[tuple(kind if says_shape(kind) else object for kind in fields)]
    return annotation


def says_shape(annotation: object) -> bool:
    """Whether an annotation has a tensor's shape in it. Not that of a callable: its arguments are seen when it is called."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return get_origin(annotation) is not Callable and any(says_shape(part) for part in get_args(annotation))


def check(function: F) -> F:
    """Let beartype check what has a shape; all other annotations are mypy's, and may name what only mypy imports."""
    hints = {name: spelled_out(kind) for name, kind in function.__annotations__.items()}
    function.__annotations__ = {name: kind for name, kind in hints.items() if says_shape(kind)}
    return beartype(function) if function.__annotations__ else function


def install() -> None:
    """Check the shapes of all modules of PACKAGES that are imported from now on."""
    install_import_hook(list(PACKAGES), "builders.shapes.check")
