"""The type checker that `test_checked_shapes` installs behind jaxtyping's annotations."""

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int passes for a float, as PEP 484 has it


def check(function):
    """beartype for functions with annotated arrays; except validators that return `Self`, which it refuses."""
    annotations = getattr(function, "__annotations__", {})
    if not any("[Tensor" in str(annotation) for annotation in annotations.values()):
        return function
    try:
        return _CHECK(function)
    except BeartypeDecorHintPep673Exception:
        return function
