"""Attention over spacetime tokens: dense, windowed, causal, packed, with text, all through one definition.

`spacetime_attention` is the function to call. Who splits the keys over devices (ring, Ulysses) calls its two halves,
`attention_forward` and `attention_backward`, and joins what two halves of the keys gave with `merge_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _check, _dispatch, _flops, _library
from .._autograd import apply, derive, needs_grad, once_differentiable, transformed
from .._operands import dense, like, narrow, parameter
from . import config, reference
from .mode import resolve
from .plan import check_padding, seen_pairs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .mode import Options

MAX_WIDTH = 256  # of a head, in the registers of a Triton program
MAX_GATED = 16384  # likewise, where nothing else is
CUDA_WIDTHS = (64, 96, 128)


@overload
def spacetime_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def spacetime_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def spacetime_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
def spacetime_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    dilation: int | Sequence[int] = 1,
    causal: str | int | Sequence[int] | None = None,
    sink: int = 0,
    text_len: int = 0,
    text_at: str = "end",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + mask) v, where the mask follows from the tokens' places in space and time

    q        [B, Sq, H, E], float32, bfloat16, float16 (float64 in `reference`), any strides
    k, v     [B, Sk, Hk, E], Hk a divisor of H: H/Hk consecutive query heads share a key head. dtype and device of q
    grid     (T, H, W) of the keys' video tokens, in t-major order. None: plain attention of any Sq and Sk. Sq may hold
             fewer frames than Sk: its frames are then the last ones (a KV cache); both hold the `text_len` text tokens
    grids    [(T, H, W), ...] instead of grid, with B = 1: clips packed one after another that do not see each other
    window   (wt, wh, ww) in tokens. On an axis of length L a query sees exactly min(w, L) keys: from
             clamp(leader − w//2, 0, L − w) on. The leader of query i is min((i//s)·s + s//2, L − 1)
    stride   s, an int or one per axis. 1: neighbourhood attention; the side of a tile: sliding-tile attention, whose
             window of an even number n of tiles sees n + 1 of them, an odd one n: give that many tiles' tokens
    window, stride   also a list of triples, one for each of the H heads: spatial and temporal heads, a tile window of
             its own for each head. (T, H, W) sees the whole clip
    dilation d, an int or one per axis, beside a window: the tokens whose index is the same modulo d are an axis of
             their own, on which window, stride and causal count; the others are not seen. No sink, no kv_lens
    causal   "frame", or n for chunks of n frames: a query sees its own and earlier chunks. (t, h, w): the chunk's side
             on each axis, 0 where it is not causal. With a window, that is the w indices that end with the last of the
             query's chunk; or, with a stride, with the last of its stride's group, without those after its chunk
    sink     the first n frames (of each clip) are seen whole whatever the window; causal still holds
    text_len text tokens after (text_at="end") or before ("start") the video: they see and are seen by everything
    kv_lens  [B] int32 or int64: only the first kv_lens[b] keys are real. The others are never read as numbers: they
             may hold NaN, and their gradients are 0. Values are checked on the CPU only (no host synchronisation)
    scale    any finite number; None: E**−0.5
    return_lse     also return the natural log of Σ exp(scale · q kᵀ) over the keys seen; differentiable
    deterministic  None or True: two runs agree bit for bit. False allows an implementation to trade that for speed:
             `sdpa` does, in its backward on a GPU

    Returns [B, Sq, H, E] in q's dtype, dense (and LSE [B, H, Sq] in fp32; fp64 for fp64). A query that sees nothing
    gives 0 and LSE −inf, and no gradient. Scores, softmax and sums are fp32, rounded once at the store; error against
    fp64 ≤ 2 × that of plain PyTorch in the same dtype plus one rounding, for the output and every gradient. A NaN
    of q, or of a key and value that a query sees, reaches that query's result; whether one of a value it does not see
    does, depends on how tiles lie. No atomics. Forward mode, torch.func and, under it, higher orders: by the
    reference's formula (docs/numerics.md), which computes the scores of all keys, a chunk of queries at a time, and
    keeps them where autograd records it.

    Implementations: `reference` runs every mode, in chunks of queries, so that memory grows with S, not S². `triton`
    runs every mode for heads of up to 256, `cpu` for heads of any width; neither permutes nor pads nor copies (but
    where the last axis is not dense), and their time falls with the share of keys that are seen. `sdpa` is PyTorch's
    own flash kernel, where every query sees every key: "auto" takes it on a GPU in bfloat16 and float16 for as long as
    no measurement recorded in `attention/config.py` says that `triton` is faster there. `cuda` is the forward of every
    mode but dilation and the backward of dense attention on sm_90, of bfloat16 or float16 heads of 64, 96 or 128, side
    by side if in a video; executed, not yet run on a GPU: "auto" never takes it.

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Sources: neighbourhood attention with stride, dilation and causal axes, arXiv 2504.16922; sliding tiles,
    arXiv 2502.04507; sinks, arXiv 2309.17453.
    """
    op = "spacetime_attention"
    _check.alone(op)
    rules = grid, grids, window, stride, dilation, causal, sink, text_len, text_at
    mode = _resolve(op, q, k, v, rules, kv_lens, scale)
    _check.choice(op, "deterministic", deterministic, (None, True, False))
    _check.flag(op, "return_lse", return_lse)
    grad = needs_grad((q, k, v))
    impl = _choose(impl, q, k, v, mode, grad)
    if grad:
        out, lse = apply(_SpacetimeAttention, q, k, v, *mode, deterministic is not False, impl)
    else:
        out, lse = _spacetime_attention(q, k, v, *mode, impl)
    return (out, lse) if return_lse else out


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    dilation: int | Sequence[int] = 1,
    causal: str | int | Sequence[int] | None = None,
    sink: int = 0,
    text_len: int = 0,
    text_at: str = "end",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `spacetime_attention`, not recorded: for schedules that keep the pieces. Has tangents.

    out_dtype  of out; None: q's. torch.float32: without the rounding to q's dtype, so that pieces which are merged are
               rounded once, as one call's are. `sdpa` and `cuda` give q's dtype alone
    """
    op = "attention_forward"
    rules = grid, grids, window, stride, dilation, causal, sink, text_len, text_at
    mode = _resolve(op, q, k, v, rules, kv_lens, scale)
    wide = _check_wide(op, out_dtype, q)
    _check.choice(op, "impl", impl, _dispatch.IMPLS)
    impl = _choose(impl, q, k, v, mode, False, wide)
    with torch.no_grad():
        if transformed():
            return apply(_SpacetimeAttention, *_widened(wide, q, k, v), *mode, True, impl)
        return _spacetime_attention(q, k, v, *mode, impl, wide=wide)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    grid: Sequence[int] | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    dilation: int | Sequence[int] = 1,
    causal: str | int | Sequence[int] | None = None,
    sink: int = 0,
    text_len: int = 0,
    text_at: str = "end",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of the output (and of the LSE), not recorded. Has tangents.

    With the `out` and `lse` of *all* keys, a part of the keys gives its dk and dv and its share of dq: the shares of a
    split add up, exactly so with `out_dtype=torch.float32`, the dtype of dq, dk and dv, where q's would round each
    share. Raises as `spacetime_attention` does; `sdpa` and `cuda` give q's dtype alone.
    """
    op = "attention_backward"
    rules = grid, grids, window, stride, dilation, causal, sink, text_len, text_at
    mode = _resolve(op, q, k, v, rules, kv_lens, scale)
    B, Sq, H, _ = q.shape
    for name, t in (("dout", dout), ("out", out)):
        _check.like(op, name, t, q, "q")
    _check.exact(op, "lse", lse, (B, H, Sq), "[B, H, Sq] of q")
    if dlse is not None:
        _check.exact(op, "dlse", dlse, (B, H, Sq), "[B, H, Sq] of q")
    _check.same_device(op, q, {"lse": lse, "dlse": dlse}, "q")
    sums = torch.promote_types(q.dtype, torch.float32)
    lse, dlse = (t if t is None else t.to(sums) for t in (lse, dlse))
    _check.choice(op, "deterministic", deterministic, (None, True, False))
    _check.choice(op, "impl", impl, _dispatch.IMPLS)
    wide = _check_wide(op, out_dtype, q)
    how = *mode, deterministic is not False, _choose(impl, q, k, v, mode, True, wide)
    with torch.no_grad():
        if transformed():
            tensors = _widened(wide, dout, dlse, q, k, v, out, lse)
            return derive(_spacetime_attention_backward, _backward_formula, *tensors, *how)
        return _spacetime_attention_backward(dout, dlse, q, k, v, out, lse, *how, wide=wide)


def merge_attention(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The (out, lse) of attention over two disjoint sets of keys as that over both, from the (out, lse) of each.

    out [B, Sq, H, E] of any float dtype, lse [B, H, Sq]. Differentiable; a query that sees nothing in either stays 0
    with LSE −inf. Computed in the dtype of the LSE and rounded to that of `out`: keep fp32 outs to merge many times.
    """
    op = "merge_attention"
    for name, pair in (("a", a), ("b", b)):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"{op}: {name} must be a pair (out, lse); got {type(pair).__name__}")
    (out_a, lse_a), (out_b, lse_b) = a, b
    _check.tensor(op, "the out of a", out_a, "[B, Sq, H, E]", ndim=4)
    _check.like(op, "the out of b", out_b, out_a, "the out of a")
    B, Sq, H, _ = out_a.shape
    _check.exact(op, "the lse of a", lse_a, (B, H, Sq), "[B, H, Sq] of out")
    _check.like(op, "the lse of b", lse_b, lse_a, "the lse of a")
    _check.same_device(op, out_a, {"the lse of a": lse_a}, "the out of a")
    # not by logaddexp: of two -inf it is right, and its derivatives are NaN
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top.isinf(), 0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    unseen = total == 0
    total = total.masked_fill(unseen, 1)
    share_a, share_b = ((weight / total).transpose(1, 2)[..., None] for weight in (weight_a, weight_b))
    lse = (top + total.log()).masked_fill(unseen, -math.inf)
    return (share_a * out_a + share_b * out_b).to(out_a.dtype), lse


def gate_heads(x: Tensor, gate: Tensor, *, scale: float = 2.0, impl: str = "auto") -> Tensor:
    """scale · sigmoid(gate) · x: the output gate of each head of an attention

    x        [B, S, H, E], float32, bfloat16, float16 (float64 in `reference`), any strides
    gate     [B, S, H], logits of any float dtype, any strides
    scale    2 as in LTX-2, whose gates begin at 1; 1 as in gated attention
    impl     "auto", "reference", "cpu" or "triton"

    Returns [B, S, H, E] in x's dtype, dense. A step of its own behind any attention - PyTorch's, a ring's, the host's -
    and not an epilogue of ours: it costs two passes over x, where attention of S tokens costs S operations an element.
    Computed in fp32, rounded once at the store; error against fp64 ≤ 2 × that of plain PyTorch in the same dtype plus
    one rounding, for the output and both gradients, which two runs give bit for bit. Forward mode, torch.func and,
    under it, higher orders: by the reference's formula (docs/numerics.md).

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Source: gated attention, arXiv 2505.06708.
    """
    op = "gate_heads"
    _check.tensor(op, "x", x, "[B, S, H, E]", ndim=4)
    _check.exact(op, "gate", gate, tuple(x.shape[:3]), "[B, S, H] of x")
    _check.same_device(op, x, {"gate": gate})
    scale = _finite(op, scale)
    x, gate = narrow(x, (x, gate))
    grad = needs_grad((x, gate))
    impl = _dispatch.choose(op, impl, x, grad=grad, limits=_dispatch.within(MAX_GATED, x.shape[3], "heads"))
    return apply(_GateHeads, x, gate, scale, impl) if grad else _gate_heads(x, gate, scale, impl)


# Validation and choice


def _resolve(op, q, k, v, rules, kv_lens, scale) -> list:
    """The arguments that all private ops take, from `kv_lens` to `scale`."""
    _check_heads(op, q, k, v)
    B, Sq, H, E = q.shape
    mode = resolve(op, Sq, k.shape[1], *rules, heads=H)
    if rules[1] is not None and B != 1:
        raise ValueError(f"{op}: grids packs the clips into one sequence, so B must be 1; got {B}")
    if kv_lens is not None:
        _check_kv_lens(op, kv_lens, q, k.shape[1])
        check_padding(op, mode)
    scale = max(E, 1) ** -0.5 if scale is None else _finite(op, scale)
    return [parameter(kv_lens), *mode, scale]


def _finite(op: str, scale: object) -> float:
    scale = _check.number(op, "scale", scale)
    if not abs(scale) < math.inf:
        raise ValueError(f"{op}: scale must be a finite number; got {scale}")
    return scale


def _check_wide(op: str, dtype: torch.dtype | None, q: Tensor) -> torch.dtype | None:
    """`out_dtype` where it is not q's."""
    sums = torch.promote_types(q.dtype, torch.float32)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in (q.dtype, sums)):
        raise ValueError(f"{op}: out_dtype must be q's {q.dtype}, {sums} or None; got {dtype!r}")
    return None if dtype == q.dtype else dtype


def _widened(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tensors if dtype is None else tuple([t if t is None else t.to(dtype) for t in tensors])


def _choose(
    impl: str, q: Tensor, k: Tensor, v: Tensor, mode: list, grad: bool, wide: torch.dtype | None = None
) -> str:
    def limits(impl: str) -> str | None:
        if impl in ("sdpa", "cuda") and wide is not None:
            return f"{impl} gives {q.dtype} for {q.dtype}; got out_dtype={wide}"
        if impl in ("triton", "sdpa") and q.shape[-1] > MAX_WIDTH:
            return f"{impl} holds heads of up to {MAX_WIDTH}; got {q.shape[-1]}"
        if impl == "sdpa":
            return _not_plain(impl, q, k, mode) or _not_for_sdpa(q, k)
        return _not_for_cuda(q, k, v, mode) if impl == "cuda" else None

    fastest = config.fastest(q) if q.is_cuda else None
    return _dispatch.choose("spacetime_attention", impl, q, grad=grad, limits=limits, fastest=fastest)


def _not_plain(impl: str, q: Tensor, k: Tensor, mode: list) -> str | None:
    """Why an implementation of dense attention alone does not take these arguments."""
    if mode[0] is not None or mode[1]:
        return f"{impl} takes attention without kv_lens, window, causal or packed clips"
    return _not_a_product(impl, q, k, mode)


def _not_a_product(impl: str, q: Tensor, k: Tensor, mode: list) -> str | None:
    if mode[-1] <= 0:
        return f"{impl} takes a scale above 0; got {mode[-1]}"
    return f"{impl} takes no empty tensors" if q.numel() == 0 or k.numel() == 0 else None


def _not_for_sdpa(q: Tensor, k: Tensor) -> str | None:
    """Why PyTorch's flash kernel does not take these heads."""
    if q.shape[2] != k.shape[2]:
        return f"sdpa takes as many key heads as query heads; got {k.shape[2]} and {q.shape[2]}"
    if q.is_cuda and (q.dtype == torch.float32 or q.shape[3] % 8 or config.capability(q.device) < 80):
        return "sdpa takes bfloat16 or float16 and a head width that is a multiple of 8 on a GPU from sm_80 on"
    return None


def _not_for_cuda(q: Tensor, k: Tensor, v: Tensor, mode: list) -> str | None:
    """Why the kernels of csrc/cuda/attention*.cu do not take these arguments."""
    if reason := _not_a_product("cuda", q, k, mode):
        return reason
    if config.capability(q.device) != 90:
        return f"cuda needs a GPU of compute capability 9.0; got {config.capability(q.device) / 10}"
    if q.dtype == torch.float32 or q.shape[3] not in CUDA_WIDTHS:
        return f"cuda takes bfloat16 or float16 heads of {CUDA_WIDTHS}; got {q.dtype} heads of {q.shape[3]}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) == 1 and not _boxed(t):
            return (
                f"cuda takes strides and offsets that are multiples of 8 elements, no expanded ones; got {name} with "
                f"strides {tuple(t.stride())} and offset {t.storage_offset()}"
            )
    return _not_boxes(q, k, v, mode) if mode[1] else None


def _not_boxes(q: Tensor, k: Tensor, v: Tensor, mode: list) -> str | None:
    """Why the kernel does not read these tensors as the boxes of a video."""
    _, grids, window, _, dilation, causal, *_ = mode
    if max(dilation) > 1:
        return f"cuda takes no dilation; got {tuple(dilation)}"
    window = window or ()
    for axis in (1, 2) if len(grids) > 3 else ():
        if causal[axis] or any(w < n for w in window[axis::3] for n in grids[axis::3]):
            return "cuda takes packed clips whose windows hold whole frames, and one clip with any"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.shape[2] > 1 and t.stride(3) == 1 and t.stride(2) != t.shape[3]:
            return f"cuda takes heads side by side with grid or grids; got {name} with strides {tuple(t.stride())}"
    return None


def _boxed(t: Tensor) -> bool:
    """Whether heads with a dense last axis lie as a TMA descriptor takes them."""
    steps = [step for size, step in zip(t.shape[:3], t.stride()[:3], strict=True) if size > 1]
    return t.storage_offset() % 8 == 0 and all(step > 0 and step % 8 == 0 for step in steps)


def _check_heads(op, q, k, v) -> None:
    _check.tensor(op, "q", q, "[B, Sq, H, E]", ndim=4)
    _check.tensor(op, "k", k, "[B, Sk, Hk, E]", ndim=4)
    (B, _, H, E), (batch, _, heads, width) = q.shape, k.shape
    if batch != B or width != E:
        raise ValueError(f"{op}: k must be [B, Sk, Hk, E] with B={B} and E={E} from q; got {_check.shape_of(k)}")
    if heads != H and (heads == 0 or H % heads):
        raise ValueError(f"{op}: the heads of k and v must divide the {H} heads of q; got {heads}")
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must have q's dtype {q.dtype}; got {k.dtype}; cast it with .to()")
    _check.same_device(op, q, {"k": k}, "q")
    _check.like(op, "v", v, k, "k")


def _check_kv_lens(op: str, kv_lens: Tensor, q: Tensor, k_len: int) -> None:
    """Raises TypeError or ValueError naming kv_lens. Values are looked at on the CPU only, and not while compiling."""
    if not isinstance(kv_lens, Tensor) or kv_lens.dtype not in (torch.int32, torch.int64) or not _check.plain(kv_lens):
        got = _check.format_of(kv_lens) if isinstance(kv_lens, Tensor) else type(kv_lens).__name__
        raise TypeError(f"{op}: kv_lens must be an int32 or int64 tensor [B]; got {got}")
    if kv_lens.ndim != 1:
        raise ValueError(f"{op}: kv_lens must be [B], one length per batch; got shape {_check.shape_of(kv_lens)}")
    if torch._C._functorch.is_batchedtensor(kv_lens):
        raise ValueError(f"{op}: kv_lens must be the same for all samples of torch.func.vmap; call it once for each")
    known = type(kv_lens) is Tensor and not torch.compiler.is_compiling()  # no fake tensor, which has no values
    if known and kv_lens.is_cpu and kv_lens.numel():
        least, most = (int(n) for n in kv_lens.aminmax())
        if least < 0 or most > k_len:
            raise ValueError(f"{op}: kv_lens must lie between 0 and Sk={k_len}; got {least} to {most}")
    _check.same_device(op, q, {"kv_lens": kv_lens}, "q")
    if kv_lens.shape[0] != q.shape[0]:
        raise ValueError(
            f"{op}: kv_lens must have one length per batch, [{q.shape[0]}]; got {_check.shape_of(kv_lens)}"
        )


# The private ops

_MODE = (
    "Tensor? kv_lens, SymInt[]? grids, SymInt[]? window, SymInt[] stride, SymInt[] dilation, SymInt[] causal, "
    "SymInt sink, SymInt text_len, bool text_first, float scale"
)
_FWD, _BWD, _KERNELS = "spacetime_attention_fwd", "spacetime_attention_bwd", ".attention.kernels"


def _forward(q, k, v, *args) -> None:
    *mode, out, lse = args
    q, k, v = _widened(out.dtype, q, k, v)
    for destination, result in zip((out, lse), reference.spacetime_attention(q, k, v, *mode), strict=True):
        destination.copy_(result)


def _backward(dout, dlse, q, k, v, out, lse, *args) -> None:
    *mode, _, dq, dk, dv = args  # one order is all it has, `deterministic` or not
    q, k, v = _widened(next((d.dtype for d in (dq, dk, dv) if d is not None), None), q, k, v)
    grads = reference.spacetime_attention_backward(dout, dlse, q, k, v, *mode, out, lse)
    for destination, grad in zip((dq, dk, dv), grads, strict=True):
        if destination is not None:
            destination.copy_(grad)


_library.define(
    _FWD,
    f"(Tensor q, Tensor k, Tensor v, {_MODE}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    reference=_forward,
    impls={
        name: provider and f"{_KERNELS}_{provider}:{_FWD}"
        for name, provider in dict(triton="forward", cpu=None, sdpa="sdpa", cuda="cuda").items()
    },
)
_library.define_launch(
    _FWD, "cuda",
    "(Tensor q, Tensor k, Tensor v, Tensor? kv_lens, Tensor? heads, Tensor? rows, Tensor? tiles, Tensor? reach, "
    "int[] own_box, int[] visit_box, int[] own_size, int[] visit_size, int own_start, int visit_start, float scale, "
    "Tensor(a!) out, Tensor(b!) lse) -> ()",
)  # fmt: skip
_library.define(
    _BWD,
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MODE}, "
    "bool deterministic, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv) -> ()",
    reference=_backward,
    impls={
        name: provider and f"{_KERNELS}_{provider}:{_BWD}"
        for name, provider in dict(triton="backward", cpu=None, sdpa="sdpa", cuda="cuda").items()
    },
)
_library.define_launch(
    f"{_BWD}_rows", "cuda", "(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor(a!) numbers) -> ()"
)
_library.define_launch(
    _BWD, "cuda",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor numbers, Tensor? kv_lens, Tensor? heads, Tensor? rows, "
    "Tensor? tiles, Tensor? reach, int[] own_box, int[] visit_box, int[] own_size, int[] visit_size, int own_start, "
    "int visit_start, float scale, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv) -> ()",
)  # fmt: skip


def _flops_fwd(
    q, k, v, kv_lens, grids, window, stride, dilation, causal, sink, text_len, text_first, scale, out, lse, *,
    out_val=None,
) -> int:  # fmt: skip
    """Two products for each pair that is seen. What `kv_lens` hides counts too: reading it would wait for a GPU."""
    return 2 * _multiplied(q, k, grids, window, stride, dilation, causal, sink, text_len, text_first)


def _flops_bwd(
    dout, dlse, q, k, v, out, lse, kv_lens, grids, window, stride, dilation, causal, sink, text_len, text_first, scale,
    deterministic=True, dq=None, dk=None, dv=None, *, out_val=None,
) -> int:  # fmt: skip
    """Five: the scores once more, dO Vᵀ, and one for each gradient."""
    products = 1 + (dq is not None or dk is not None) + sum(d is not None for d in (dq, dk, dv))
    return products * _multiplied(q, k, grids, window, stride, dilation, causal, sink, text_len, text_first)


def _multiplied(q, k, *form) -> int:
    """Operations of one product of all heads and batches."""
    B, Sq, H, E = q.shape
    sizes = Sq, k.shape[1], form
    if form[0]:  # sizes that a compiler leaves open stand for those it saw
        sizes = pytree.tree_map(lambda n: n.node.hint if isinstance(n, torch.SymInt) else n, sizes)
    return 2 * B * E * seen_pairs(*sizes, H)


_flops.register(_FWD, _flops_fwd)
_flops.register(_BWD, _flops_bwd)


def _spacetime_attention(q, k, v, *args, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    *mode, impl = args
    B, Sq, H, _ = q.shape
    if impl == "cpu":  # which computes in fp32 and stores what it was given
        q, k, v = _widened(wide, q, k, v)
    out = like(q, dtype=wide)
    lse = q.new_empty((B, H, Sq), dtype=torch.promote_types(q.dtype, torch.float32))
    _library.call(_FWD, impl)(dense(q), dense(k), dense(v), *mode, out, lse)
    return out, lse


def _spacetime_attention_backward(
    dout, dlse, q, k, v, out, lse, *args, wanted=(True,) * 3, wide: torch.dtype | None = None
) -> tuple[Tensor | None, ...]:
    *mode, impl = args
    if impl == "cpu":  # as in forward
        dout, q, k, v, out = _widened(wide, dout, q, k, v, out)
    grads = [like(t, needed, dtype=wide) for t, needed in zip((q, k, v), wanted, strict=True)]
    dlse, dout, out = dlse if dlse is None else dlse.contiguous(), dense(dout), dense(out)
    if impl == "cuda":  # which refused a q, k or v of such strides
        dout, out = (t if _boxed(t) else t.clone(memory_format=torch.contiguous_format) for t in (dout, out))
    _library.call(_BWD, impl)(dout, dlse, dense(q), dense(k), dense(v), out, lse.contiguous(), *mode, *grads)
    return tuple(grads)


def _backward_formula(dout, dlse, q, k, v, out, lse, *args) -> tuple[Tensor, Tensor, Tensor]:
    *mode, _, _ = args
    return reference.spacetime_attention_backward(dout, dlse, q, k, v, *mode, out, lse)


class _SpacetimeAttention(torch.autograd.Function):
    @staticmethod
    def formula(*args):
        *inputs, _, _ = args
        return reference.spacetime_attention(*inputs)

    @staticmethod
    def forward(ctx, q, k, v, kv_lens, *args):
        ctx.set_materialize_grads(False)
        *mode, _, impl = args
        out, lse = _spacetime_attention(q, k, v, kv_lens, *mode, impl)
        ctx.save_for_backward(q, k, v, out, lse, kv_lens)
        ctx.constants = args
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, kv_lens = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        args = dout, dlse, q, k, v, out, lse, kv_lens, *ctx.constants
        grads = _spacetime_attention_backward(*args, wanted=ctx.needs_input_grad[:3])
        return *grads, None, *(None for _ in ctx.constants)


# gate_heads

_library.define(
    "gate_heads_fwd",
    "(Tensor x, Tensor gate, float scale, Tensor(a!) out) -> ()",
    reference=lambda x, gate, scale, out: out.copy_(reference.gate_heads(x, gate, scale)),
    impls={"triton": f"{_KERNELS}_gate:gate_heads_fwd", "cpu": None},
)
_library.define(
    "gate_heads_bwd",
    "(Tensor dout, Tensor x, Tensor gate, float scale, Tensor(a!)? dx, Tensor(b!)? dgate) -> ()",
    reference=lambda dout, x, gate, scale, dx, dgate: _library.vjp(
        lambda x, gate: reference.gate_heads(x, gate, scale), dict(x=x, gate=gate), (dout,), dict(x=dx, gate=dgate)
    ),
    impls={"triton": f"{_KERNELS}_gate:gate_heads_bwd", "cpu": None},
)


def _gate_heads(x, gate, scale, impl) -> Tensor:
    out = like(x)
    _library.call("gate_heads_fwd", impl)(dense(x), gate, scale, out)
    return out


class _GateHeads(torch.autograd.Function):
    @staticmethod
    def formula(x, gate, scale, impl):
        return reference.gate_heads(x, gate, scale)

    @staticmethod
    def forward(ctx, x, gate, scale, impl):
        ctx.save_for_backward(x, gate)
        ctx.settings = scale, impl
        return _gate_heads(x, gate, scale, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gate = ctx.saved_tensors
        scale, impl = ctx.settings
        dx, dgate = (like(t, needed) for t, needed in zip((x, gate), ctx.needs_input_grad, strict=False))
        _library.call("gate_heads_bwd", impl)(dense(dout), dense(x), gate, scale, dx, dgate)
        return dx, dgate, None, None
