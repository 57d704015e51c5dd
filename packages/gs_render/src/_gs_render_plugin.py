"""Component manifest of gs-render; listing plugins imports nothing heavier than this file."""
