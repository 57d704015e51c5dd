"""FLUX autoencoder features of images, and multi-view lifting of features onto voxels."""

from flux_features._config import FluxFeaturesConfig as FluxFeaturesConfig
from flux_features._dino import DinoFeatures as DinoFeatures
from flux_features._dino import DinoFeaturesConfig as DinoFeaturesConfig
from flux_features._extractor import FluxFeatures as FluxFeatures
from flux_features._lifting import lift_features as lift_features
from flux_features._lifting import voxel_centres as voxel_centres

__all__ = [
    "DinoFeatures",
    "DinoFeaturesConfig",
    "FluxFeatures",
    "FluxFeaturesConfig",
    "lift_features",
    "voxel_centres",
]
