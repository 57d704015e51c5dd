"""Axial rotary embedding over any number of axes, as a module without parameters or buffers."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Num
from torch import Tensor, nn

from marope._frequencies import RotaryTable, Scaling, check_axes, check_scaling, per_axis, rotary_table
from marope._rotate import apply_rotary


class AxialRoPE(nn.Module):
    """Rotary embedding whose head is split among the axes of a position vector.

    Args:
        head_dim: channels of an attention head, even.
        axes_dim: even number of channels for each axis; what is left of `head_dim` is not rotated.
        theta: base of the wavelengths, one for all axes or one an axis.
        interleaved: which channels form a pair, see `apply_rotary`.
        scaling: `("linear", factor)` or `("ntk", factor)` for positions that run further than in training, see
            `rotary_table`.

    There is nothing to cast, to move or to save: tables follow the device of the positions they are made from, and
    nothing is cached inside the module. Keep the table yourself where positions stay the same.
    """

    def __init__(
        self,
        head_dim: int,
        axes_dim: Sequence[int],
        *,
        theta: float | Sequence[float] = 10000.0,
        interleaved: bool = True,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.axes_dim = check_axes(head_dim, axes_dim)
        self.theta = per_axis("theta", theta, len(self.axes_dim))
        self.interleaved = interleaved
        self.scaling = check_scaling(scaling, len(self.axes_dim))

    def table(self, positions: Num[Tensor, "*batch L axes"]) -> RotaryTable:
        """The float32 (cos, sin) of `positions`, to be made once and used in every layer and sampling step."""
        return rotary_table(positions, self.head_dim, self.axes_dim, self.theta, self.scaling)

    def rotate(
        self,
        q: Float[Tensor, "*batch L heads head_dim"],
        k: Float[Tensor, "*batch L heads head_dim"],
        table: RotaryTable,
    ) -> tuple[Float[Tensor, "*batch L heads head_dim"], Float[Tensor, "*batch L heads head_dim"]]:
        """Queries and keys rotated by `table`; each keeps its dtype."""
        return (
            apply_rotary(q, table, interleaved=self.interleaved),
            apply_rotary(k, table, interleaved=self.interleaved),
        )

    def forward(
        self,
        q: Float[Tensor, "*batch L heads head_dim"],
        k: Float[Tensor, "*batch L heads head_dim"],
        positions: Num[Tensor, "*positions L axes"],
    ) -> tuple[Float[Tensor, "*batch L heads head_dim"], Float[Tensor, "*batch L heads head_dim"]]:
        """`rotate(q, k, table(positions))`: padded [B, L, H, D] or packed [L, H, D] queries and keys."""
        return self.rotate(q, k, self.table(positions))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, axes_dim={self.axes_dim}, theta={self.theta}, "
            f"interleaved={self.interleaved}, scaling={self.scaling}"
        )
