"""3D Gaussian splatting in Python: Gaussians, cameras, differentiable rendering, file formats, viewers."""
