"""Component manifest of diff2to3; listing plugins imports nothing heavier than this file."""
