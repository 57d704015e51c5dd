"""Evaluation: reconstruction by the 2to3-VAE, generation from one picture; every figure beside its controls."""
