"""The tree of errors is the one that its module draws, and each error is also the standard one a caller expects."""

import inspect

from smelt import errors


def drawn_tree() -> dict[str, str]:
    """child -> parent, read from the drawing in the module's docstring: a level is four columns deep."""
    parents: dict[str, str] = {}
    path = ["SmeltError"]
    for line in (errors.__doc__ or "").splitlines():
        branch, found, rest = line.partition("── ")
        if found:
            depth = len(branch) // 4 + 1
            name = rest.split()[0]
            parents[name] = path[depth - 1]
            path = [*path[:depth], name]
    return parents


def real_tree() -> dict[str, str]:
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    return {error.__name__: error.__bases__[0].__name__ for error in classes if error is not errors.SmeltError}


def test_the_drawing_is_the_tree() -> None:
    assert drawn_tree() == real_tree()


def test_every_error_says_what_it_means() -> None:
    assert all(getattr(errors, name).__doc__ for name in real_tree())


def test_errors_are_also_the_standard_ones() -> None:
    assert issubclass(errors.InvalidInput, ValueError)
    assert issubclass(errors.NotFound, LookupError)
    assert issubclass(errors.MissingDependency, ImportError)
    assert issubclass(errors.OutOfSpace, OSError)
    assert issubclass(errors.TrainingError, RuntimeError)
