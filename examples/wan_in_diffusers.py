"""Wan in diffusers, on our operations: a pipeline from a local folder, or a tiny transformer with random weights.

python examples/wan_in_diffusers.py [FOLDER of Wan2.1-T2V-1.3B-Diffusers]
"""

import sys

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from sora_kernels.integrations import patch_model, patched, verify_patch


def pipeline(folder: str) -> None:
    """Makes a clip with the patched pipeline."""
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    print(patch_model(pipe))  # its transformer and its VAE
    frames = pipe("a cat walks on a wall", num_frames=17, height=256, width=256, output_type="np").frames[0]
    print(frames.shape)


def tiny() -> float:
    """The largest difference that patching makes to the output."""
    torch.manual_seed(0)
    sizes = dict(num_layers=2, num_attention_heads=2, attention_head_dim=32, ffn_dim=128, text_dim=48)
    model = WanTransformer3DModel(**sizes).eval()
    inputs = dict(
        hidden_states=torch.randn(1, 16, 3, 8, 8),
        timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 12, 48),
    )
    with torch.no_grad():
        expected = model(**inputs).sample
        with patched(model) as report:
            print(report)
            out = model(**inputs).sample
            print(verify_patch(model))
    worst = (out - expected).abs().max().item()
    print(f"patched and not: {worst:.1e} apart at most")
    return worst


if __name__ == "__main__":
    pipeline(sys.argv[1]) if sys.argv[1:] else tiny()
