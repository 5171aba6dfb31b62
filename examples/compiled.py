"""torch.compile: a block with our operations is one graph, forward and backward, whatever the length of the clip.

python examples/compiled.py [BACKEND]     inductor, or aot_eager where no compiler is at hand
"""

import sys

import torch
from dit_block import Block


def main(backend: str = "inductor") -> None:
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=backend)  # fullgraph: a graph break would be an error
    for batch in (1, 2):
        x, rows = torch.randn(batch, 320, 192), torch.randn(batch, 1, 6 * 192)
        out = compiled(leaf := x.clone().requires_grad_(), rows)
        out.square().mean().backward()
        expected = block(again := x.clone().requires_grad_(), rows)
        expected.square().mean().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(leaf.grad, again.grad)
    print(f"compiled by {backend} without a graph break; output and gradient are those of eager")


if __name__ == "__main__":
    main(*sys.argv[1:2])
