"""Figures of merit against values worked out by hand."""

import numpy as np
import pytest
import torch
from diff2to3.eval._scores import (
    foreground_psnr,
    on_white,
    picture_scores,
    silhouette_iou,
    summary,
    table,
    voxel_f_score,
    voxel_iou,
)


def test_straight_alpha_is_composited_on_white():
    rgba = np.zeros((1, 2, 2, 4), np.uint8)
    rgba[0, 0, 0] = (255, 0, 0, 51)  # a fifth of red
    color, alpha = on_white(rgba)
    assert color[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.8, 0.8])
    assert color[0, :, 1, 1].tolist() == [1, 1, 1]
    assert alpha[0, 0].flatten().tolist() == pytest.approx([0.2, 0, 0, 0])
    assert on_white(rgba, 1)[0][0, :, 0, 0].tolist() == pytest.approx([1.0, 0.95, 0.95])


def test_foreground_psnr_ignores_the_background():
    target, alpha = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    alpha[..., :2, :] = 1
    image = target.clone()
    image[..., :2, :] -= 0.1
    image[..., 2:, :] = 0
    assert foreground_psnr(image, target, alpha).item() == pytest.approx(20.0, abs=1e-4)
    scores = picture_scores(*(x.repeat(1, 1, 4, 4) for x in (image, target, alpha)), None)
    assert scores["psnr"] < scores["psnr_foreground"]


def test_voxel_scores():
    true = torch.tensor([[0, 0, 0], [5, 5, 5]])
    assert voxel_f_score(true, true) == 1
    assert voxel_f_score(torch.tensor([[1, 1, 0]]), true) == pytest.approx(2 * 1 * 0.5 / 1.5)  # sqrt 2 away
    assert voxel_f_score(torch.tensor([[1, 1, 1]]), true) == 0  # sqrt 3 away
    assert voxel_f_score(torch.zeros(0, 3), true) == 0
    assert voxel_iou(torch.tensor([[0, 0, 0], [1, 0, 0]]), true) == pytest.approx(1 / 3)


def test_silhouette():
    found, true = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    found[..., 0, :] = 0.9
    true[..., 0] = 0.9
    assert silhouette_iou(found, true).item() == pytest.approx(1 / 3)


def test_table_reports_mean_and_median_of_what_each_object_has():
    rows = [{"id": "a", "psnr": 20.0}, {"id": "b", "psnr": 30.0, "lpips": 0.5}, {"id": "c", "psnr": 40.5}]
    found = summary(rows)
    assert found["psnr"] == {"mean": pytest.approx(30.1667, abs=1e-3), "median": 30.0, "n": 3}
    assert found["lpips"]["n"] == 1
    text = table(rows, {"some": rows[:1]})
    assert "| psnr | 30.17 (30) | 20 (20) |" in text
