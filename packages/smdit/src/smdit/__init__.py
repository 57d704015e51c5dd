"""Sparse-structure multi-modal diffusion transformer (SMDiT), flow matching and samplers."""
