"""Errors that a user can act on. The command line turns each into one line on stderr and exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was received and what is expected."""


class ImageInputError(InputError):
    """A picture is missing, unreadable, too large, or shows no object."""


class ComponentNotFoundError(InputError):
    """No component of that name is installed and usable."""


class DuplicateComponentError(InputError):
    """Two distributions announce the same name for the same role."""


class ComponentError(InputError):
    """A component cannot be imported, configured or built, or does not do what its role asks for."""


class PipelineFormatError(InputError):
    """A pipeline directory is incomplete, damaged, or does not fit together."""


class OutputError(InputError):
    """A file cannot be written: the disk is full, may not be written to, is gone. What comes next would fail too."""


class DeviceMemoryError(InputError):
    """The device has too little memory for what is asked; the message says what to lower."""


class NonFiniteError(RuntimeError):
    """A component gave NaN or infinite numbers; the message says which, and which of its tensors is broken."""
