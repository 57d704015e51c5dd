"""``python -m diff2to3``: the same as the command ``diff2to3``."""

from diff2to3._cli import main

if __name__ == "__main__":
    main()
