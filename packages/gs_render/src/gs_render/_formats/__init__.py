"""File formats. `_registry.py` names them; each other module reads and/or writes one, in the frame of the file."""
