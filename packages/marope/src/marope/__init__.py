"""Rotary position embedding for mixed 2D/3D tokens (MARoPE)."""
