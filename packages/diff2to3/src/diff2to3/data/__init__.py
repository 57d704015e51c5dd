"""Data toolkit: assets -> rendered views -> voxels -> lifted features -> latents, one resumable stage a step."""
