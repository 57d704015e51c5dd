"""What command lines offer: describe a file, convert one, look at one."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gs_render._axes import Up
from gs_render._formats._registry import find_format, load, save
from gs_render._gaussians import Gaussians
from gs_render._pictures import FOV_DEGREES, framing, turntable_cameras, viewing_distance

if TYPE_CHECKING:
    import viser


def describe(path: str | os.PathLike[str], up: Up | None = None) -> dict[str, Any]:
    """Facts about a splat file, ready for JSON: format, count, degree, bounds, ranges.

    Bounds are in the world frame (z up); `up` as in `load`.
    """
    gaussians = load(path, up)
    facts: dict[str, Any] = {
        "path": str(path),
        "format": find_format(path).suffix,
        "bytes": Path(path).stat().st_size,
        "gaussians": len(gaussians),
        "sh_degree": gaussians.sh_degree,
    }
    if len(gaussians):
        longest = gaussians.scales.amax(dim=1)
        facts |= {
            "low": gaussians.means.amin(dim=0).tolist(),
            "high": gaussians.means.amax(dim=0).tolist(),
            "median_scale": float(longest.median()),
            "largest_scale": float(longest.max()),
            "mean_opacity": float(gaussians.opacities.mean()),
            "invisible": int((gaussians.opacities < 1 / 255).sum()),
        }
    return facts


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], up: Up | None = None) -> Path:
    """Read one file and write another, types by suffix; `up` overrides the custom of the source's format.

    Warns:
        LossWarning: the target cannot keep something that the source holds.
    """
    find_format(target)  # refuse an unknown type before the work of reading
    return save(load(source, up), target)


def view(
    path: str | os.PathLike[str],
    port: int = 8080,
    up: Up | None = None,
    *,
    host: str = "127.0.0.1",
    announce: Callable[[str], object] = print,
) -> None:
    """Show a splat in the browser with viser (extra `view`) until the process is interrupted (Ctrl-C).

    Args:
        path: any file that `load` reads.
        port: of the server on this machine; the next free one is taken if it is in use.
        up: as in `load`.
        host: address to listen on; the default can be reached from this machine only.
        announce: called with the page's address once the page can be opened.
    """
    gaussians = load(path, up)
    try:
        import viser
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "viewing needs viser: pip install 'gs-render[view]' (or convert to .html, which needs nothing)"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # its banner comes even where verbose=False
        server = viser.ViserServer(host=host, port=port, label=Path(path).name, verbose=False)
    try:
        _show(server, gaussians)
        announce(f"http://{server.get_host()}:{server.get_port()}")
        server.sleep_forever()
    except KeyboardInterrupt:
        pass  # the way to leave
    finally:
        with contextlib.redirect_stdout(io.StringIO()):
            server.stop()


def _show(server: viser.ViserServer, gaussians: Gaussians) -> None:
    """Put the Gaussians into a viser scene, seen from where a turntable starts."""
    centre, radius = framing(gaussians)
    server.scene.set_up_direction("+z")
    camera = server.initial_camera
    camera.fov = math.radians(FOV_DEGREES)
    camera.look_at = centre.numpy()
    camera.position = turntable_cameras(1, gaussians=gaussians).positions[0].numpy()
    distance = viewing_distance(radius)
    camera.near, camera.far = distance / 100, distance * 100
    server.scene.add_gaussian_splats(
        "/splat",
        centers=gaussians.means.numpy(),
        covariances=gaussians.covariances.numpy(),
        rgbs=gaussians.rgb.clamp(0, 1).numpy(),
        opacities=gaussians.opacities[:, None].numpy(),
    )
