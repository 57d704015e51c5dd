"""Numba kernels of the CPU backend: EWA projection and its gradient, the compiled twin of `gs_render._project`.

Names follow that module. Derivatives are written out by hand in the order of the chain rule, from the picture back to
the parameters. No fast-math flag that assumes finite numbers: not-a-number must come out as "not visible".
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from gs_render._backends._compile import compiled
from gs_render._project import CLAMP_MARGIN, MIN_ALPHA, MIN_COMPENSATION, NEAR

_f32 = np.float32
_NEAR, _MIN_ALPHA, _MARGIN = _f32(NEAR), _f32(MIN_ALPHA), _f32(CLAMP_MARGIN)
_MIN_RATIO = _f32(MIN_COMPENSATION)
_ZERO, _HALF, _ONE, _TWO = _f32(0), _f32(0.5), _f32(1), _f32(2)
_OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc", "afn"}, "error_model": "numpy"}


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _rotation(quaternion):
    """(nine entries of the matrix, unit quaternion, length)."""
    w, x, y, z = quaternion[0], quaternion[1], quaternion[2], quaternion[3]
    length = np.sqrt(w * w + x * x + y * y + z * z)
    inverse = _ONE / length if length > _ZERO else _ZERO
    w, x, y, z = w * inverse, x * inverse, y * inverse, z * inverse
    matrix = (
        (_ONE - _TWO * (y * y + z * z), _TWO * (x * y - w * z), _TWO * (x * z + w * y)),
        (_TWO * (x * y + w * z), _ONE - _TWO * (x * x + z * z), _TWO * (y * z - w * x)),
        (_TWO * (x * z - w * y), _TWO * (y * z + w * x), _ONE - _TWO * (x * x + y * y)),
    )
    return matrix, (w, x, y, z), inverse


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _camera_point(pose, mean):
    return (
        pose[0, 0] * mean[0] + pose[0, 1] * mean[1] + pose[0, 2] * mean[2] + pose[0, 3],
        pose[1, 0] * mean[0] + pose[1, 1] * mean[1] + pose[1, 2] * mean[2] + pose[1, 3],
        pose[2, 0] * mean[0] + pose[2, 1] * mean[1] + pose[2, 2] * mean[2] + pose[2, 3],
    )


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _clamp_limits(intrinsics, axis, size):
    """Bounds of x / z (or y / z) at which the projection is linearised."""
    focal, centre = intrinsics[axis, axis], intrinsics[axis, 2]
    margin = _MARGIN * _f32(size) / focal
    return -centre / focal - margin, (_f32(size) - centre) / focal + margin


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _image_axis(pose, axis, bent, per_z, matrix, scale, direction, out):
    """Row of Jacobian x rotation (`direction`), and of that times the half axes (`out`)."""
    for i in range(3):
        direction[i] = (pose[axis, i] - bent * pose[2, i]) * per_z
    for k in range(3):
        out[k] = (direction[0] * matrix[0][k] + direction[1] * matrix[1][k] + direction[2] * matrix[2][k]) * scale[k]


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@compiled(**_OPTIONS)
@no_type_check
def project_rows(first, last, inputs, pose, intrinsics, options, outputs):
    """Project Gaussians [first, last); `inputs`, `outputs` as in `cpu.project`, `options` (w, h, filter, antialias)."""
    means, scales, quaternions, opacities = inputs
    centres, conics, seen_opacities, depths, reach, visible = outputs
    width, height, blur, antialias = options
    low_x, high_x = _clamp_limits(intrinsics, 0, width)
    low_y, high_y = _clamp_limits(intrinsics, 1, height)
    du, dv, a, b = np.empty(3, _f32), np.empty(3, _f32), np.empty(3, _f32), np.empty(3, _f32)
    for g in range(first, last):
        x, y, z = _camera_point(pose, means[g])
        depths[g] = z
        visible[g] = False
        if not z > _NEAR:
            centres[g, :], conics[g, :], reach[g, :], seen_opacities[g] = _ZERO, _ZERO, _ZERO, _ZERO
            continue
        matrix, _, _ = _rotation(quaternions[g])
        rx, ry = x / z, y / z
        _image_axis(pose, 0, min(max(rx, low_x), high_x), intrinsics[0, 0] / z, matrix, scales[g], du, a)
        _image_axis(pose, 1, min(max(ry, low_y), high_y), intrinsics[1, 1] / z, matrix, scales[g], dv, b)
        xx = a[0] * a[0] + a[1] * a[1] + a[2] * a[2]
        xy = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
        yy = b[0] * b[0] + b[1] * b[1] + b[2] * b[2]
        c0, c1, c2 = _cross(a, b)
        area = c0 * c0 + c1 * c1 + c2 * c2
        blurred = area + blur * (xx + yy) + blur * blur
        drawable = blurred > _ZERO and blurred < _f32(np.inf)
        blurred = blurred if drawable else _ONE
        opacity = opacities[g] * np.sqrt(max(area / blurred, _MIN_RATIO)) if antialias else opacities[g]
        conics[g, 0], conics[g, 1], conics[g, 2] = (yy + blur) / blurred, -xy / blurred, (xx + blur) / blurred
        u, v = rx * intrinsics[0, 0] + intrinsics[0, 2], ry * intrinsics[1, 1] + intrinsics[1, 2]
        centres[g, 0], centres[g, 1] = u, v
        seen_opacities[g] = opacity
        extend = np.sqrt(_TWO * np.log(max(opacity, _MIN_ALPHA) / _MIN_ALPHA))
        reach[g, 0], reach[g, 1] = extend * np.sqrt(xx + blur), extend * np.sqrt(yy + blur)
        inside_x = u + reach[g, 0] > _ZERO and u - reach[g, 0] < _f32(width)
        inside_y = v + reach[g, 1] > _ZERO and v - reach[g, 1] < _f32(height)
        visible[g] = drawable and inside_x and inside_y and opacity >= _MIN_ALPHA


@compiled(**_OPTIONS)
@no_type_check
def project_rows_backward(first, last, inputs, pose, intrinsics, options, visible, upstream, gradients, pose_gradient):
    """Gradient of `project_rows`; `upstream` belongs to its first four outputs, `gradients` to its inputs.

    `pose_gradient` [3, 4] float64 belongs to this range of Gaussians alone.
    """
    means, scales, quaternions, opacities = inputs
    g_centres, g_conics, g_opacities, g_depths = upstream
    g_means, g_scales, g_quaternions, g_inputs_opacity = gradients
    width, height, blur, antialias = options
    limits = (_clamp_limits(intrinsics, 0, width), _clamp_limits(intrinsics, 1, height))
    directions, half = np.empty((2, 3), _f32), np.empty((2, 3), _f32)
    g_half, g_point, g_matrix = np.empty((2, 3), _f32), np.empty(3, _f32), np.empty((3, 3), _f32)
    for g in range(first, last):
        if not visible[g]:
            continue
        point = _camera_point(pose, means[g])
        z = point[2]
        matrix, unit, inverse = _rotation(quaternions[g])
        scale = scales[g]
        for axis in range(2):
            bent = min(max(point[axis] / z, limits[axis][0]), limits[axis][1])
            focal = intrinsics[axis, axis]
            _image_axis(pose, axis, bent, focal / z, matrix, scale, directions[axis], half[axis])
        a, b = half[0], half[1]
        xx = a[0] * a[0] + a[1] * a[1] + a[2] * a[2]
        xy = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
        yy = b[0] * b[0] + b[1] * b[1] + b[2] * b[2]
        c = _cross(a, b)
        area = c[0] * c[0] + c[1] * c[1] + c[2] * c[2]
        blurred = area + blur * (xx + yy) + blur * blur

        # conic = (yy + blur, -xy, xx + blur) / blurred
        g0, g1, g2 = g_conics[g, 0] / blurred, g_conics[g, 1] / blurred, g_conics[g, 2] / blurred
        g_blurred = -(g0 * (yy + blur) - g1 * xy + g2 * (xx + blur)) / blurred
        g_area = _ZERO
        if antialias:
            ratio = area / blurred
            compensation = np.sqrt(max(ratio, _MIN_RATIO))
            g_inputs_opacity[g] = g_opacities[g] * compensation
            if ratio > _MIN_RATIO:
                g_ratio = g_opacities[g] * opacities[g] * _HALF / compensation
                g_area += g_ratio / blurred
                g_blurred -= g_ratio * ratio / blurred
        else:
            g_inputs_opacity[g] = g_opacities[g]
        g_area += g_blurred
        g_xx, g_xy, g_yy = g2 + blur * g_blurred, -g1, g0 + blur * g_blurred

        # area = |a x b|^2 and the three products of a and b
        to_a, to_b = _cross(b, c), _cross(c, a)
        for k in range(3):
            g_half[0, k] = _TWO * (g_area * to_a[k] + g_xx * a[k]) + g_xy * b[k]
            g_half[1, k] = _TWO * (g_area * to_b[k] + g_yy * b[k]) + g_xy * a[k]

        # a = direction_x (matrix * scale); direction = (row of the rotation - bent * third row) * focal / z
        g_point[0] = g_point[1] = _ZERO
        g_point[2] = g_depths[g]
        for i in range(3):
            for k in range(3):
                g_matrix[i, k] = directions[0, i] * g_half[0, k] + directions[1, i] * g_half[1, k]
        for axis in range(2):
            focal, ratio = intrinsics[axis, axis], point[axis] / z
            low, high = limits[axis]
            bent = min(max(ratio, low), high)
            g_bent = g_per_z = _ZERO
            for i in range(3):
                row = matrix[i]
                g_direction = (
                    row[0] * scale[0] * g_half[axis, 0]
                    + row[1] * scale[1] * g_half[axis, 1]
                    + row[2] * scale[2] * g_half[axis, 2]
                )
                g_per_z += g_direction * (pose[axis, i] - bent * pose[2, i])
                g_bent -= g_direction * pose[2, i] * focal / z
                pose_gradient[axis, i] += g_direction * focal / z
                pose_gradient[2, i] -= g_direction * bent * focal / z
            g_ratio = g_centres[g, axis] * focal
            if ratio > low and ratio < high:
                g_ratio += g_bent
            g_point[axis] += g_ratio / z
            g_point[2] -= g_ratio * ratio / z + g_per_z * focal / (z * z)

        for j in range(3):
            g_means[g, j] = pose[0, j] * g_point[0] + pose[1, j] * g_point[1] + pose[2, j] * g_point[2]
            for i in range(3):
                pose_gradient[i, j] += g_point[i] * means[g, j]
            pose_gradient[j, 3] += g_point[j]
            column = _ZERO
            for i in range(3):
                column += g_matrix[i, j] * matrix[i][j]
                g_matrix[i, j] *= scale[j]
            g_scales[g, j] = column
        _rotation_backward(g_matrix, unit, inverse, g_quaternions[g])


@compiled(inline="always", **_OPTIONS)
@no_type_check
def _rotation_backward(m, unit, inverse, out):
    """Gradient of `_rotation` with respect to the quaternion before it was brought to unit length."""
    w, x, y, z = unit
    gw = _TWO * (x * (m[2, 1] - m[1, 2]) + y * (m[0, 2] - m[2, 0]) + z * (m[1, 0] - m[0, 1]))
    gx = _TWO * (
        w * (m[2, 1] - m[1, 2]) + y * (m[0, 1] + m[1, 0]) + z * (m[0, 2] + m[2, 0]) - _TWO * x * (m[1, 1] + m[2, 2])
    )
    gy = _TWO * (
        w * (m[0, 2] - m[2, 0]) + x * (m[0, 1] + m[1, 0]) + z * (m[1, 2] + m[2, 1]) - _TWO * y * (m[0, 0] + m[2, 2])
    )
    gz = _TWO * (
        w * (m[1, 0] - m[0, 1]) + x * (m[0, 2] + m[2, 0]) + y * (m[1, 2] + m[2, 1]) - _TWO * z * (m[0, 0] + m[1, 1])
    )
    along = gw * w + gx * x + gy * y + gz * z
    out[0], out[1] = (gw - along * w) * inverse, (gx - along * x) * inverse
    out[2], out[3] = (gy - along * y) * inverse, (gz - along * z) * inverse
