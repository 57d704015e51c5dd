"""A manifest that needs a module which nobody has."""

import a_module_that_nobody_has  # noqa: F401
