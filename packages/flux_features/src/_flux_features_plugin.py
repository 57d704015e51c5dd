"""Component manifest of flux-features; listing plugins imports nothing heavier than this file."""
