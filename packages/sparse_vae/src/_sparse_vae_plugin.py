"""Component manifest of sparse-vae; listing plugins imports nothing heavier than this file."""
