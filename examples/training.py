"""Training: a small video transformer learns flow matching on moving squares, and the same seed gives the same weights.

python examples/training.py [STEPS]
"""

import sys

import torch
from dit_block import Block
from torch import Tensor, nn

from sora_kernels import final_layer, patch_embed3d

PATCH = (1, 2, 2)


class Model(nn.Module):
    def __init__(self, channels: int = 4, dim: int = 192, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv3d(channels, dim, PATCH, PATCH)
        self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, 8 * dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.head = nn.Linear(dim, channels * 4)

    def forward(self, video: Tensor, t: Tensor) -> Tensor:
        x = patch_embed3d(video, self.embed.weight, self.embed.bias)
        rows, last = self.time(t[:, None]).unsqueeze(1).split([6 * x.shape[-1], 2 * x.shape[-1]], -1)
        for block in self.blocks:
            x = block(x, rows)
        return final_layer(x, *last.chunk(2, -1), self.head.weight, self.head.bias, grid=(5, 8, 8), patch=PATCH)


def batch(generator: torch.Generator, size: int = 2) -> Tensor:
    """Latents [B, 4, 5, 16, 16] with a square that moves to the right."""
    clips = torch.zeros(size, 4, 5, 16, 16)
    for clip in clips:
        row, column = torch.randint(0, 8, (2,), generator=generator).tolist()
        for frame in range(5):
            clip[:, frame, row : row + 4, column + frame : column + frame + 4] = 1
    return clips


def train(steps: int) -> tuple[Model, list[float]]:
    torch.manual_seed(0)
    model, generator, losses = Model(), torch.Generator().manual_seed(1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        clean = batch(generator)
        noise, t = torch.randn(clean.shape, generator=generator), torch.rand(len(clean), generator=generator)
        at = t[:, None, None, None, None]
        loss = (model((1 - at) * clean + at * noise, t) - (noise - clean)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main(steps: int = 100) -> None:
    (one, losses), (two, _) = train(steps), train(steps)
    same = all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps; two runs, the same bits: {same}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
