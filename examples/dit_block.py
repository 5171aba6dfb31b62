"""A block of a diffusion transformer over video tokens: in plain torch, and the same with our operations.

python examples/dit_block.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels import gate_residual, gate_residual_norm_modulate, norm_modulate, qk_norm_rope, spacetime_attention

GRID = (5, 8, 8)  # frames, rows, columns of tokens


class Block(nn.Module):
    """adaLN, self-attention with 3D RoPE, MLP."""

    def __init__(self, dim: int = 192, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:  # [B, S, D], [B, 1, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, -1)
        h = norm_modulate(x, shift1, scale1)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)  # views of [B, S, H, E]
        q, k = qk_norm_rope(q, k, q_weight=self.norm_q.weight, k_weight=self.norm_k.weight, grid=GRID)
        y = self.out(spacetime_attention(q, k, v).flatten(2))
        x, h = gate_residual_norm_modulate(x, y, gate1, shift2, scale2)
        return gate_residual(x, self.mlp(h), gate2)


class PlainBlock(Block):
    """The same in plain torch: what a model writes without the operations."""

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, -1)
        dim = x.shape[-1:]
        h = F.layer_norm(x, dim, eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (
            rotate(F.rms_norm(t, t.shape[-1:], w, 1e-6)) for t, w in ((q, self.norm_q.weight), (k, self.norm_k.weight))
        )
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        x = x + gate1 * self.out(y.flatten(2))
        h = F.layer_norm(x, dim, eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


def rotate(x: Tensor) -> Tensor:
    """Pairs of channels, shared out over the three axes as in Wan, turned by each token's place."""
    pairs = x.shape[-1] // 2
    counts = pairs - 2 * (pairs // 3), pairs // 3, pairs // 3
    places = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    angles = [p.reshape(-1, 1) * 1e4 ** (-torch.arange(n) / n) for p, n in zip(places, counts, strict=True)]
    turn = torch.polar(torch.ones(()), torch.cat(angles, 1))[:, None]  # [S, 1, E/2]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def main() -> float:
    """The largest difference of the two, outputs and gradients."""
    torch.manual_seed(0)
    block, plain = Block(), PlainBlock()
    plain.load_state_dict(block.state_dict())
    x, rows = torch.randn(2, 320, 192), torch.randn(2, 1, 6 * 192)
    results = []
    for model in (block, plain):
        out = model(leaf := x.clone().requires_grad_(), rows)
        results.append((out, *torch.autograd.grad(out.square().mean(), [leaf, *model.parameters()])))
    worst = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    print(f"plain torch and our operations, output and {len(results[0]) - 1} gradients: {worst:.1e} apart at most")
    return worst


if __name__ == "__main__":
    main()
