"""Component manifest of smdit; listing plugins imports nothing heavier than this file."""
