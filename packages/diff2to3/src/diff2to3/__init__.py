"""One picture in, a 3D Gaussian splatting asset out."""
