"""FLUX autoencoder features of images, and multi-view lifting of features onto voxels."""
