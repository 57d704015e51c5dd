"""Sparse voxel tensors, convolutions and attention, and the 2to3-VAE."""
