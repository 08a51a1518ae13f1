"""Methods that installed packages add, through the entry point group `mbf_mlx.methods`.

Nothing is read before a method is asked for that is not ours, and a package's code is imported only when its own method
is made. docs/methods.md shows such a package.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from mbf_mlx.errors import InputError
from mbf_mlx.methods.base import Method

GROUP = "mbf_mlx.methods"


@cache
def _found() -> dict[str, list[EntryPoint]]:
    """Return the entry points of each name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        if point not in found.setdefault(point.name, []):  # a package may stand on the path twice
            found[point.name].append(point)
    return found


def names() -> list[str]:
    """Return the names that installed packages give their methods, in alphabetical order."""
    return sorted(_found())


def load(name: str) -> type[Method] | None:
    """Return the class behind a name; None if no package has it.

    Raises:
        InputError: two packages have the name, the class cannot be imported, or it is not a method of this name.
    """
    points = _found().get(name, [])
    if not points:
        return None
    if len(points) > 1:
        raise InputError(
            f"method {name}: expected one package with this method, got {', '.join(map(_origin, points))}"
            "\nhint: uninstall all but one"
        )
    origin = _origin(points[0])
    try:
        made = points[0].load()
    except Exception as error:  # anything may go wrong while code that is not ours is imported
        raise InputError(
            f"method {name}: {origin} cannot be loaded: {type(error).__name__}: {error}"
            "\nhint: update, repair or uninstall that package"
        ) from error
    if not (isinstance(made, type) and issubclass(made, Method)):
        raise InputError(f"method {name}: expected a subclass of mbf_mlx.methods.Method, got {made!r} from {origin}")
    if (own := vars(made).get("name")) != name:
        raise InputError(
            f"method {name}: expected a class with name = {name!r}, got {own!r} from {origin}: a stream remembers its"
            " method by this name"
        )
    if missing := sorted(made.__abstractmethods__):
        raise InputError(f"method {name}: {origin} does not define {', '.join(missing)}")
    return made


def _origin(point: EntryPoint) -> str:
    return f"{point.value} of the package {point.dist.name}" if point.dist else point.value
