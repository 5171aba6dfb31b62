"""What the tokens of a sequence belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sora_kernels import qk_norm_rope, spacetime_attention

from .attention import AttentionMode, Grid


class Context:
    """Each sequence is one clip, and all of it is there.

    Others: frames that follow remembered ones (`memory.Past`), several clips one after another (`packed.Pack`), some of
    the tokens of clips (`parallel.Share`).
    `index` [1, S] is the row of modulation of each token where rows are not for whole frames.
    """

    index: Tensor | None = None

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Any, mode: AttentionMode, norms: Mapping[str, Any]
    ) -> Tensor:
        """Of tokens as projected, `[B, S, H, E]`: normalised, turned, and attending to those that the mode says.

        norms  further arguments of `qk_norm_rope`
        """
        q, k, v, grid = self.joined(q, k, v, grid, norms)
        return spacetime_attention(q, k, v, **mode.keywords(grid), impl=norms["impl"])

    def joined(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, norms: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Of tokens as projected: q turned; k turned and v, of what they see; the grid, or grids, of all that."""
        q, k = qk_norm_rope(q, k, grid=grid, **norms)
        return q, k, v, grid

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, impl: str) -> Tensor:
        """Attention over a text, or an image, of each clip: q `[B, S, H, E]`, k and v `[n, L, H, E]`."""
        return spacetime_attention(q, k, v, kv_lens=kv_lens, impl=impl)
