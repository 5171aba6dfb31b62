"""The arithmetic of a clip, beside what PyTorch counts of diffusers' own models with the same sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sora_model import CausalVAE, SoraDiT, estimate

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")


def counted(function, *args, **kwargs) -> int:
    # the flash kernel of a CPU is not counted, the products that it stands for are
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def test_operations_of_the_transformer_are_those_counted():
    sizes = dict(num_layers=2, num_attention_heads=2, attention_head_dim=48, ffn_dim=256, text_dim=32, freq_dim=32)
    host = diffusers.WanTransformer3DModel(**sizes)
    latents = torch.randn(1, 16, 5, 16, 16)
    inputs = dict(timestep=torch.tensor([500]), encoder_hidden_states=torch.randn(1, 4, 32))
    theirs = counted(host, hidden_states=latents, **inputs)
    ours = estimate.denoise_flops(SoraDiT.from_wan(host), latents.shape[1:], evaluations=1)
    assert ours == pytest.approx(theirs, rel=0.05)
    assert estimate.denoise_flops(SoraDiT.from_wan(host), latents.shape[1:], evaluations=40) == 40 * ours


def test_operations_of_the_decoder_are_those_counted():
    sizes = dict(
        base_dim=16, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    host = diffusers.AutoencoderKLWan(**sizes).eval()
    latents = torch.randn(1, 4, 9, 4, 4)
    theirs = counted(host.decode, latents)
    # the first latent becomes one frame where the others become four, and shortcuts and attention are left out
    ours = CausalVAE.from_wan(host)
    assert estimate.decode_flops(ours, latents.shape[1:]) == pytest.approx(theirs, rel=0.15)
    video = torch.randn(1, 3, 33, 32, 32)
    assert estimate.encode_flops(ours, video.shape[1:]) == pytest.approx(counted(host.encode, video), rel=0.15)
    assert ours.config.latent_shape(33, 32, 32) == latents.shape[1:]


def test_the_time_of_a_long_video_is_guessed_and_of_a_short_one_not(monkeypatch):
    vae = CausalVAE()
    monkeypatch.setattr(estimate, "rate", lambda device, dtype: 1e11)
    assert estimate.coding_seconds(vae, 81, 480, 832) == pytest.approx(
        2 * estimate.coding_seconds(vae, 41, 480, 832), rel=0.1
    )
    assert estimate.coding_seconds(vae, 82, 480, 832) > 1000
    assert estimate.coding_seconds(vae, 1, 16, 16) == 0


@pytest.mark.parametrize(
    "duration, words",
    [(0.2, "about 1 second"), (42, "about 42 seconds"), (89, "about 89 seconds"), (100, "about 2 minutes"),
     (7000, "about 2 hours"), (400_000, "about 5 days")],
)  # fmt: skip
def test_a_duration_in_words(duration, words):
    assert estimate.in_words(duration) == words


def test_the_rate_is_that_of_a_product():
    rate = estimate.rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15 and estimate.rate(torch.device("cpu"), torch.float32) == rate  # measured once
