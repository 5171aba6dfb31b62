"""A CUDA graph of a block: captured once, replayed without Python. Needs a GPU with triton.

Never run yet: no GPU has been at hand. The operations are written for it: they do not wait for the GPU, and what they
allocate follows from shapes.

python examples/cuda_graph.py
"""

import sys

import torch
from dit_block import Block


def main() -> str:
    if not torch.cuda.is_available():
        return "this example needs a GPU: torch finds none here"
    torch.manual_seed(0)
    block = Block().cuda().bfloat16().requires_grad_(False)
    x, rows = torch.randn(1, 320, 192), torch.randn(1, 1, 6 * 192)
    x, rows = x.cuda().bfloat16(), rows.cuda().bfloat16()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls compile kernels and build plans, which a capture cannot hold
        for _ in range(3):
            block(x, rows)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x, rows)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, block(x, rows))
    return "captured and replayed: the graph gives what the block gives"


if __name__ == "__main__":
    said = main()
    print(said)
    sys.exit(0 if "replayed" in said else 1)
