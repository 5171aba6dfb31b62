"""qk_norm_rope in the conventions of public models: what reaches the attention inside diffusers' own classes, on random
parameters."""

from __future__ import annotations

import pytest
import torch

from sora_kernels.qknorm_rope import qk_norm_rope


def attended(monkeypatch, owner, name, attention, *args, **kwargs):
    """The queries and keys that `attention(...)` hands to the function `owner.name`."""
    seen = []

    def record(q, k, v, *_, **__):
        seen.extend((q, k))
        return v

    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(owner, name, record)
        attention(*args, **kwargs)
    return seen


def projected(attention, x, heads):
    with torch.no_grad():
        return tuple(f(x).unflatten(2, (heads, -1)) for f in (attention.to_q, attention.to_k))


def affine(attention, *names):
    return {f"{x}_{name}": getattr(getattr(attention, f"norm_{x}"), name).detach() for x in "qk" for name in names}


def assert_same(ours, theirs, tolerance=3e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("E, grid", [(12, (3, 2, 5)), (128, (2, 3, 2)), (40, (1, 4, 3))])
def test_wan_in_diffusers(E, grid, monkeypatch):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    T, H, W = grid
    rope = wan.WanRotaryPosEmbed(E, (1, 2, 2), 64)
    attention = wan.WanAttention(2 * E, 2, E, eps=1e-5, processor=wan.WanAttnProcessor())
    x, freqs = torch.randn(2, T * H * W, 2 * E), rope(torch.empty(1, 4, T, 2 * H, 2 * W))
    theirs = attended(monkeypatch, wan, "dispatch_attention_fn", attention, x, rotary_emb=freqs)
    settings = affine(attention, "weight") | dict(across="width", grid=grid, eps=1e-5)
    assert_same(qk_norm_rope(*projected(attention, x, 2), **settings), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_wan_rounds_after_the_norm_and_so_does_rounding_host(impl, dtype, monkeypatch, require):
    """In 16 bits a quarter of the host's own values are others than those rounded once."""
    require("qk_norm_rope", impl, dtype=dtype)
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    E, (T, H, W) = 128, (3, 4, 5)
    rope = wan.WanRotaryPosEmbed(E, (1, 2, 2), 64)
    attention = wan.WanAttention(4 * E, 4, E, eps=1e-6, processor=wan.WanAttnProcessor()).to(dtype)
    x, freqs = torch.randn(2, T * H * W, 4 * E).to(dtype), rope(torch.empty(1, 4, T, 2 * H, 2 * W))
    theirs = attended(monkeypatch, wan, "dispatch_attention_fn", attention, x, rotary_emb=freqs)
    settings = affine(attention, "weight") | dict(across="width", grid=(T, H, W), impl=impl)
    projections = projected(attention, x, 4)

    def differing(rounding):
        pairs = zip(qk_norm_rope(*projections, **settings, rounding=rounding), theirs, strict=True)
        return max((ours != host).float().mean().item() for ours, host in pairs)

    assert differing("host") < 2e-3, "but for sums in another order, next to the middle of two values"
    assert differing("once") > 0.1


def test_hunyuan_video_in_diffusers(monkeypatch):
    hunyuan = pytest.importorskip("diffusers.models.transformers.transformer_hunyuan_video")
    rope = hunyuan.HunyuanVideoRotaryPosEmbed(2, 1, [4, 6, 6], theta=256.0)
    attention = hunyuan.HunyuanVideoSingleTransformerBlock(2, 16, mlp_ratio=1.0).attn
    video, text, freqs = torch.randn(2, 18, 32), torch.randn(2, 5, 32), rope(torch.empty(1, 4, 3, 4, 6))
    call = dict(encoder_hidden_states=text, image_rotary_emb=freqs)
    theirs = attended(monkeypatch, hunyuan, "dispatch_attention_fn", attention, video, **call)
    settings = affine(attention, "weight") | dict(grid=(3, 2, 3), split=(2, 3, 3), theta=256.0, text_len=5)
    assert_same(qk_norm_rope(*projected(attention, torch.cat((video, text), 1), 2), **settings), theirs)


def test_cogvideox_in_diffusers(monkeypatch):
    """Its QK-norm is a LayerNorm with a bias, and its text comes first."""
    cogvideox = pytest.importorskip("diffusers.models.transformers.cogvideox_transformer_3d")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    attention = cogvideox.CogVideoXBlock(32, 2, 16, 8).attn1
    freqs = embeddings.get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 4)
    video, text = torch.randn(2, 24, 32), torch.randn(2, 5, 32)
    call = dict(encoder_hidden_states=text, image_rotary_emb=freqs)
    functional = torch.nn.functional
    theirs = attended(monkeypatch, functional, "scaled_dot_product_attention", attention, video, **call)
    settings = affine(attention, "weight", "bias") | dict(norm="layer", grid=(4, 2, 3), split=(2, 3, 3))
    q, k = projected(attention, torch.cat((text, video), 1), 2)
    assert settings["q_bias"].abs().min() > 0
    assert_same(
        qk_norm_rope(q, k, **settings, text_len=5, text_at="start"), [t.transpose(1, 2) for t in theirs], 1e-5
    )


def test_ltx_turns_the_whole_width(monkeypatch):
    ltx = pytest.importorskip("diffusers.models.transformers.transformer_ltx")
    attention = ltx.LTXAttention(20, heads=2, kv_heads=2, dim_head=10)
    freqs = ltx.LTXVideoRotaryPosEmbed(20)(torch.empty(1, 12, 3), 2, 2, 3)
    x = torch.randn(2, 12, 20)
    theirs = attended(monkeypatch, ltx, "dispatch_attention_fn", attention, x, image_rotary_emb=freqs)
    cos, sin = (f[0, :, ::2] for f in freqs)
    settings = affine(attention, "weight") | dict(freqs=(cos, sin), eps=1e-5)
    ours = qk_norm_rope(*(t.flatten(2).unsqueeze(2) for t in projected(attention, x, 2)), **settings)
    assert_same([t.squeeze(2).unflatten(2, (2, 10)) for t in ours], theirs)


def ltx2(rope_type, E, tokens, times):
    """Random attention and, for two clips at positions of their own, the tables of `tokens` tokens, as it takes them
    and as `freqs`."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    rope = module.LTX2AudioVideoRotaryPosEmbed(3 * E, rope_type=rope_type, num_attention_heads=3)
    theirs = rope(torch.rand(2, 3, tokens) * times)
    if rope_type == "split":  # [B, H, S, E/2]
        return theirs, tuple(t.transpose(1, 2) for t in theirs)
    return theirs, tuple(t[..., ::2].unflatten(-1, (3, -1)) for t in theirs)  # [B, S, H·E], each angle twice


@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
def test_ltx2_has_other_angles_for_each_head_and_clip(rope_type, monkeypatch):
    module = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    attention = module.LTX2Attention(36, heads=3, kv_heads=3, dim_head=12, rope_type=rope_type)
    rope, freqs = ltx2(rope_type, 12, 7, 20)
    x = torch.randn(2, 7, 36)
    theirs = attended(monkeypatch, module, "dispatch_attention_fn", attention, x, query_rotary_emb=rope)
    settings = affine(attention, "weight") | dict(across="width", freqs=freqs, interleaved=rope_type == "interleaved")
    assert_same(qk_norm_rope(*projected(attention, x, 3), **settings), theirs)


@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
def test_ltx2_attends_from_video_to_sound(rope_type, monkeypatch):
    """Keys of another length turn by angles of their own."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    attention = module.LTX2Attention(20, 3, 3, 12, cross_attention_dim=28, rope_type=rope_type)
    (rope, freqs), (k_rope, k_freqs) = ltx2(rope_type, 12, 7, 20), ltx2(rope_type, 12, 5, 90)
    video, sound = torch.randn(2, 7, 20), torch.randn(2, 5, 28)
    call = dict(encoder_hidden_states=sound, query_rotary_emb=rope, key_rotary_emb=k_rope)
    theirs = attended(monkeypatch, module, "dispatch_attention_fn", attention, video, **call)
    settings = affine(attention, "weight") | dict(freqs=freqs, k_freqs=k_freqs, interleaved=rope_type == "interleaved")
    with torch.no_grad():
        q, k = attention.to_q(video).unflatten(2, (3, -1)), attention.to_k(sound).unflatten(2, (3, -1))
    assert_same(qk_norm_rope(q, k, across="width", **settings), theirs)


def test_cosmos_pairs_halves(monkeypatch):
    cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
    freqs = cosmos.CosmosRotaryPosEmbed(24, patch_size=(1, 2, 2))(torch.empty(1, 4, 3, 4, 6), fps=30)
    attention = cosmos.CosmosTransformerBlock(2, 24, 48, qk_norm="rms_norm", adaln_lora_dim=8).attn1
    x = torch.randn(2, 18, 48)
    theirs = attended(monkeypatch, cosmos, "dispatch_attention_fn", attention, x, image_rotary_emb=freqs)
    tables = tuple(t[:, :12] for t in freqs)
    settings = affine(attention, "weight") | dict(freqs=tables, interleaved=False, eps=attention.norm_q.eps)
    assert_same(qk_norm_rope(*projected(attention, x, 2), **settings), theirs)


def test_mochi_has_learned_frequencies_for_each_head(monkeypatch):
    """Its text has projections and norms of its own, and is not turned."""
    mochi = pytest.importorskip("diffusers.models.transformers.transformer_mochi")
    attention = mochi.MochiTransformerBlock(24, 2, 12, 16).attn1
    freqs = mochi.MochiRoPE()(torch.randn(3, 2, 6), 2, 3, 2, dtype=torch.float32)
    video, text, mask = torch.randn(1, 12, 24), torch.randn(1, 5, 16), torch.ones(1, 5)
    call = dict(encoder_hidden_states=text, attention_mask=mask, image_rotary_emb=freqs)
    functional = torch.nn.functional
    theirs = attended(monkeypatch, functional, "scaled_dot_product_attention", attention, video, **call)
    of_video = qk_norm_rope(*projected(attention, video, 2), **affine(attention, "weight"), freqs=freqs, eps=1e-5)
    with torch.no_grad():
        q, k = (f(text).unflatten(2, (2, -1)) for f in (attention.add_q_proj, attention.add_k_proj))
    weights = dict(q_weight=attention.norm_added_q.weight.detach(), k_weight=attention.norm_added_k.weight.detach())
    of_text = qk_norm_rope(q, k, **weights, eps=1e-5)
    assert_same([torch.cat(pair, 1) for pair in zip(of_video, of_text, strict=True)],
                [t.transpose(1, 2) for t in theirs])  # fmt: skip


def test_minimax_h3_turns_a_part_of_each_head(monkeypatch):
    h3 = pytest.importorskip("diffusers.models.transformers.transformer_minimax_h3")
    attention = h3.MiniMaxH3Attention(40, 2, 16)
    position, x = torch.randint(0, 50, (9, 3)), torch.randn(1, 9, 40)
    cos, sin = h3.MiniMaxH3RotaryPosEmbed(2)(position)
    theirs = attended(monkeypatch, h3, "dispatch_attention_fn", attention, x, rotary_emb=(cos, sin))
    settings = affine(attention, "weight") | dict(freqs=(cos[:, :6], sin[:, :6]), interleaved=False, eps=1e-5)
    assert_same(qk_norm_rope(*projected(attention, x, 2), **settings), theirs)
