"""The rows of the paper's tables 1 to 3 (Diff2to3: 1,000 assets of Toys4k, its own cameras and sizes)."""

from __future__ import annotations

Rows = dict[str, dict[str, float]]

#: Arrows and spelling of the paper's columns.
COLUMNS = {
    "ssim": "SSIM ↑",
    "psnr": "PSNR ↑",
    "lpips": "LPIPS ↓",
    "CLIP": "CLIP ↑",
    "FD_incep": "FD_incep ↓",
    "KD_incep": "KD_incep (%) ↓",
    "FD_dinov2": "FD_dinov2 ↓",
    "KD_dinov2": "KD_dinov2 (%) ↓",
    "FD_vgg": "FD_vgg ↓",
    "KD_vgg": "KD_vgg (%) ↓",
    "cos_vgg": "cos_vgg ↑",
    "params": "# Param. (M)",
}
RECONSTRUCTION_COLUMNS = ("ssim", "psnr", "lpips")
GENERATION_COLUMNS = ("CLIP", "FD_incep", "KD_incep", "FD_dinov2", "KD_dinov2", "params")


def _rows(columns: tuple[str, ...], figures: dict[str, tuple[float, ...]]) -> Rows:
    return {name: dict(zip(columns, values, strict=True)) for name, values in figures.items()}


RECONSTRUCTION = _rows(
    RECONSTRUCTION_COLUMNS,
    {
        "GaussianAnything": (0.9475, 26.73, 0.06397),
        "TRELLIS": (0.9712, 30.14, 0.02901),
        "Diff2to3": (0.9773, 31.86, 0.02633),
    },
)
GENERATION = _rows(
    GENERATION_COLUMNS,
    {
        "Shap-E": (86.32, 133.96, 8.23, 792.43, 147.72, 300),
        "LGM": (87.23, 65.89, 1.33, 662.91, 75.49, 415),
        "InstantMesh": (89.95, 45.38, 2.54, 392.15, 24.48, 866),
        "GaussianAnything": (85.09, 65.31, 8.07, 702.03, 71.72, 586),
        "3DTopia-XL": (86.10, 64.39, 1.16, 619.11, 64.28, 909),
        "TRELLIS": (98.02, 24.57, 0.0421, 146.14, 8.74, 770),
        "Diff2to3": (98.45, 19.78, 0.0394, 122.90, 3.78, 821),
    },
)
ABLATION = _rows(
    GENERATION_COLUMNS[:-1],
    {
        "Exp 1": (98.02, 24.57, 0.0421, 146.14, 8.74),
        "Exp 2": (96.96, 30.24, 0.0523, 210.50, 5.58),
        "Exp 3": (97.11, 28.74, 0.0496, 159.34, 4.11),
        "Exp 4": (98.45, 19.78, 0.0394, 122.90, 3.78),
    },
)
