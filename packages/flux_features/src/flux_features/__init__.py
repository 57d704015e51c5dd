"""FLUX autoencoder features of images, and multi-view lifting of features onto voxels."""

from flux_features._config import FluxFeaturesConfig as FluxFeaturesConfig
from flux_features._dino import DinoFeatures as DinoFeatures
from flux_features._dino import DinoFeaturesConfig as DinoFeaturesConfig
from flux_features._extractor import FluxFeatures as FluxFeatures
from flux_features._hub import ask_on_terminal as ask_on_terminal
from flux_features._lifting import lift_features as lift_features
from flux_features._lifting import voxel_centres as voxel_centres
from flux_features._sources import load_extractor as load_extractor
from flux_features._vgg import VGGFeatures as VGGFeatures
from flux_features._vgg import VGGFeaturesConfig as VGGFeaturesConfig

__all__ = [
    "DinoFeatures",
    "DinoFeaturesConfig",
    "FluxFeatures",
    "FluxFeaturesConfig",
    "VGGFeatures",
    "VGGFeaturesConfig",
    "ask_on_terminal",
    "lift_features",
    "load_extractor",
    "voxel_centres",
]
