"""QK-norm and 3D rotary embedding in one pass over q and k; the sums that a norm across ranks needs first."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check, _dispatch, _library
from .._autograd import apply, needs_grad, once_differentiable
from .._operands import dense, like, narrow, parameter, written
from . import reference

NORMS = (None, "rms", "layer")  # as the private ops number them
FREQS = "[tokens, rotary_dim/2], [tokens, H, rotary_dim/2] or [B or 1, tokens, H or 1, rotary_dim/2]"
CUDA_ANGLES = 256  # kMaxSteps of csrc/cuda/qknorm_rope.cu
MAX_CHANNELS = 16384  # that one Triton program holds in registers


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = "rms",
    across: str = "head",
    stats: Tensor | None = None,
    width: int | None = None,
    grid: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    freqs: tuple[Tensor, Tensor] | None = None,
    k_freqs: tuple[Tensor, Tensor] | None = None,
    split: Sequence[int] | None = None,
    theta: float = 1e4,
    interleaved: bool = True,
    rotary_dim: int | None = None,
    origin: Sequence[int] = (0, 0, 0),
    text_len: int = 0,
    text_at: str = "end",
    eps: float = 1e-6,
    rounding: str = "once",
    out: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(rotate(norm(q) · q_weight + q_bias), rotate(norm(k) · k_weight + k_bias))

        norm="rms":    norm(x) = x / √(mean(x²) + eps)
        norm="layer":  norm(x) = (x − mean(x)) / √(var(x) + eps)            (biased variance)
        norm=None:     norm(x) = x
        rotate:        (a, b) → (a cos φ − b sin φ, a sin φ + b cos φ) for each rotary pair (a, b) of a head

    q, k         [B, S, H, E], float32, bfloat16, float16 (float64 in `reference`), any strides (views into a packed
                 QKV are not copied); k may have another number of heads, and another length where nothing is rotated
                 or k_freqs are given
    q_weight, k_weight  [E] for across="head"; [H·E] (of q, of k) for across="width"; any float dtype
    q_bias, k_bias      as the weights, for norm="layer" only
    across       what the statistics are taken over: each "head", or the whole "width" of all heads of a token
    stats, width  of heads divided over ranks, for norm="rms" and across="width": `qk_norm_stats` of q and k added up
                 over the ranks, and the channels of q's heads on all of them (k's are in the proportion of the heads)
    grid         (T, H, W): token (t·H + h)·W + w turns by φ = (x + origin) · theta^(−j/n) for pair j of the n pairs of
                 the axis of x ∈ {t, h, w}; angles are computed on the fly, in fp64 in `reference`, elsewhere as
                 64-bit fractions of a turn, exact at any position
    tokens       (start, stop): q and k hold these of the grid's tokens, as a rank's share of a clip. None: all
    freqs        (cos, sin) instead of grid, each [S, rotary_dim/2], the same for every head and clip, [S, H,
                 rotary_dim/2], or [B, S, H, rotary_dim/2] with B, H or both 1; any float dtype, any strides; constants
    k_freqs      (cos, sin) of k, where they are not those of q: for its own heads and tokens
    split        rotary pairs of (t, h, w), with sum rotary_dim/2. None: (n − 2·(rotary_dim//6), rotary_dim//6,
                 rotary_dim//6) with n = rotary_dim/2, as in Wan (22, 21, 21 for E = 128)
    interleaved  pairs are channels (2i, 2i+1); False: (i, i + rotary_dim/2)
    rotary_dim   the first rotary_dim channels of each head are rotated, the others only normalised. None: E
                 (with freqs: twice their width)
    origin       added to the coordinates (t, h, w); streaming passes the number of frames already made
    text_len     so many tokens, of q and of k, are normalised, not rotated: grid and freqs cover the others
    text_at      where those are: at the "end", or, as in CogVideoX, at the "start"
    rounding     "once", at the store; or as a "host" rounds whose norm is a module of its own: after the norm, weight
                 and bias too, and again at the store. Nearer to that model, further from fp64. Gradients are the same
    out          (q_out, k_out), where to write: of the shapes, dtype and device of q and k, dense in E and else of any
                 strides - the video's tokens of a buffer that it shares with text -, no memory of an input; for
                 inference only
    impl         "auto", "reference", "cpu", "triton" or "cuda" (executed, not yet run on a GPU: "auto" never
                 takes it)

    Without grid and freqs only the norm is applied. Returns (q, k) in their shapes and dtype, dense (or `out`).
    Statistics and products are fp32, rounded once at the store; error against fp64 ≤ 2 × that of plain PyTorch in the
    same dtype plus one rounding. The backward recomputes the statistics and reduces the parameters' gradients in fp32
    in a fixed order: two runs agree bit for bit. Forward mode, torch.func and, under it, higher orders: by the
    reference's formula (docs/numerics.md).

    Gradients flow into stats as into q: through the caller's all-reduce, if that is differentiable, and `qk_norm_stats`
    they come back to q and k, and those of the weights are of the rank's own channels (docs/distributed.md).

    LTX-Video pairs channels over the whole width, which is then one head of width H·E: pass q.flatten(2).unsqueeze(2).
    LTX-2 pairs split halves of each head, by angles that differ from head to head and clip to clip: pass its tables
    [B, H, S, E/2] as freqs .transpose(1, 2), and between video and sound those of the keys as k_freqs.

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Sources: RoPE, arXiv 2104.09864; the 3D convention of Wan, arXiv 2503.20314.
    """
    op = "qk_norm_rope"
    _, S, H, E = _check_heads(op, q, k)
    _check.choice(op, "norm", norm, ("rms", "layer", None))
    _check.choice(op, "across", across, ("head", "width"))
    _check.flag(op, "interleaved", interleaved)
    _check.choice(op, "rounding", rounding, ("once", "host"))
    eps = _check.positive(op, "eps", eps)
    _check_affine(op, q, H, E, norm, across, q_weight=q_weight, q_bias=q_bias)
    _check_affine(op, k, k.shape[2], E, norm, across, k_weight=k_weight, k_bias=k_bias)
    text_len = _check.integer(op, "text_len", text_len, 0, S if k_freqs is None else min(S, k.shape[1]), "S=")
    _check.choice(op, "text_at", text_at, ("end", "start"))
    first = text_len if text_at == "start" else 0  # the first token that is not text
    theta = _check.positive(op, "theta", theta)
    *tables, axes = _rotation(op, q, k, S, E, grid, tokens, freqs, k_freqs, split, rotary_dim, origin, text_len)
    widths = _check_stats(op, q, k, stats, width, norm, across)
    by_width = across == "width"
    tensors = narrow(q, (q, k, q_weight, k_weight, q_bias, k_bias, stats))
    if out is not None:
        if not (isinstance(out, tuple) and len(out) == 2 and out[0] is not out[1]):
            raise ValueError(f"{op}: out must be a pair of two tensors (q_out, k_out); got {type(out).__name__}")
        written(op, out, (("q", q), ("k", k)), (*tensors, *tables))
    grad = out is None and needs_grad(tensors)
    channels = E * (max(H, k.shape[2]) if by_width else 1)
    wide = _dispatch.within(MAX_CHANNELS, channels, "norms")

    def limits(name: str) -> str | None:
        if name != "cuda":
            return wide and wide(name)
        given = dict(q=q, k=k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
        given |= {} if out is None else dict(q_out=out[0], k_out=out[1])
        reason = _not_for_cuda(given, tables, axes, by_width, interleaved)
        if reason is None and grad:
            reason = _no_gradients_in_cuda(q, k, norm, stats, tables, axes, by_width, interleaved)
        return reason

    impl = _dispatch.choose(op, impl, q, grad=grad, limits=limits)
    host = rounding == "host" and norm is not None
    settings = (NORMS.index(norm), by_width, axes, theta, first, interleaved, eps, *widths, host, impl)
    if grad:
        return apply(_QKNormRope, *tensors, *tables, settings)
    return _qk_norm_rope(*tensors, *tables, settings, out=out)


def qk_norm_stats(q: Tensor, k: Tensor, *, impl: str = "auto") -> Tensor:
    """Of each token the sum of squares over the heads that are here: what an RMS norm across the width needs of each
    rank where heads are divided over ranks. One read of q and k.

    q, k     [B, S, H, E], float32, bfloat16, float16 (float64 in `reference`), any strides; k may have other heads and
             another length
    impl     "auto", "reference", "cpu" or "triton"

    Returns [B, S + S of k] in fp32 (fp64 of fp64): the tokens of q, then those of k. Added up over the ranks they are
    the `stats` of `qk_norm_rope`. Error against fp64 ≤ 2 × that of plain PyTorch in the same dtype plus one rounding,
    for the sums and both gradients, 2·q·dstats; two runs agree bit for bit. Forward mode, torch.func and, under it,
    higher orders: by the reference's formula (docs/numerics.md).

        stats = all_reduce(qk_norm_stats(q, k), "sum", group)     # of torch.distributed._functional_collectives
        q, k = qk_norm_rope(q, k, across="width", stats=stats, width=ranks * H * E, q_weight=..., grid=...)

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    """
    op = "qk_norm_stats"
    _, _, H, E = _check_heads(op, q, k)
    grad = needs_grad((q, k))
    limits = _dispatch.within(MAX_CHANNELS, E * max(H, k.shape[2]), "sums")
    impl = _dispatch.choose(op, impl, q, grad=grad, limits=limits)
    return apply(_QKNormStats, q, k, impl) if grad else _qk_norm_stats(q, k, impl)


# Validation


def _check_heads(op, q, k) -> torch.Size:
    """The shape of q."""
    _check.tensor(op, "q", q, "[B, S, H, E]", ndim=4)
    _check.tensor(op, "k", k, "[B, S, H, E]", ndim=4)
    shape, of_k = q.shape, k.shape
    B, _, _, E = shape
    if of_k[0] != B or of_k[3] != E:
        raise ValueError(f"{op}: k must have q's batch {B} and head width {E}; got shape {_check.shape_of(k)}")
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must have q's dtype {q.dtype}; got {k.dtype}; cast it with .to()")
    if k.device != q.device:
        _check.same_device(op, q, {"k": k}, "q")
    return shape


def _check_affine(op, x, H, E, norm, across, **parameters: Tensor | None) -> None:
    for name, t in parameters.items():
        if t is None:
            continue
        if norm is None:
            raise ValueError(f"{op}: {name} applies to normalised values; with norm=None leave it out")
        if name.endswith("bias") and norm != "layer":
            raise ValueError(f"{op}: {name} belongs to norm='layer'; got norm={norm!r}")
        if across == "head":
            _check.exact(op, name, t, (E,), "[E], the head width, for across='head'")
        else:
            _check.exact(op, name, t, (H * E,), f"[H*E], {H} heads of width {E}, for across='width'")
        if t.device != x.device:
            _check.same_device(op, x, {name: t}, name[0])


def _check_stats(op, q, k, stats, width, norm, across) -> tuple[int, int]:
    """The channels of q and of k on all ranks; 0 without stats."""
    if stats is None:
        if width is not None:
            raise ValueError(f"{op}: width is that of the heads on all ranks, for stats=; got no stats")
        return 0, 0
    B, S, H, E = q.shape
    tokens, heads = k.shape[1:3]
    if norm != "rms" or across != "width":
        raise ValueError(
            f"{op}: stats are sums of squares for norm='rms' and across='width'; got norm={norm!r}, across={across!r}"
        )
    _check.exact(op, "stats", stats, (B, S + tokens), "[B, tokens of q and of k], what qk_norm_stats gave, added up")
    if stats.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: stats must be float32, as qk_norm_stats gives them; got {stats.dtype}")
    _check.same_device(op, q, {"stats": stats}, "q")
    if width is None:
        raise ValueError(f"{op}: stats need width=, the channels of q's heads on all ranks; got None")
    width = _check.integer(op, "width", width, max(H * E, 1))
    if heads != H and width * heads % max(H, 1):
        raise ValueError(f"{op}: width must be divided as the heads are, {H} of q and {heads} of k here; got {width}")
    return reference.widths(width, H, heads)


def _rotation(op, q, k, S, E, grid, tokens, freqs, k_freqs, split, rotary_dim, origin, text_len):
    """(cos, sin, k_cos, k_sin, axes) as the op takes them: all None where nothing is rotated."""
    if grid is not None and freqs is not None:
        raise ValueError(f"{op}: give grid (angles computed on the fly) or freqs=(cos, sin), not both")
    if k_freqs is not None and freqs is None:
        raise ValueError(f"{op}: k_freqs are those of k beside freqs=(cos, sin) of q; got none of q")
    if grid is None and tokens is not None:
        raise ValueError(f"{op}: tokens are those of a grid=(T, H, W); got none")
    if grid is None and freqs is None:
        for name, value in (("split", split), ("rotary_dim", rotary_dim)):
            if value is not None:
                raise ValueError(f"{op}: {name} needs grid=(T, H, W) or freqs=(cos, sin); got neither")
        return None, None, None, None, None
    if k.shape[1] != S and k_freqs is None:
        raise ValueError(
            f"{op}: q and k must have the same tokens to be rotated alike; q has {S}, k has {k.shape[1]}; "
            "pass freqs and k_freqs"
        )
    if freqs is None:
        key = op, S, E, grid, tokens, split, rotary_dim, origin, text_len
        if torch.compiler.is_compiling():
            return None, None, None, None, _check_grid(*key)
        try:
            hash(key)
        except TypeError:  # lists; symbols in the place of sizes
            return None, None, None, None, _check_grid(*key)
        return None, None, None, None, _check_grid_once(*key)
    if split is not None:
        raise ValueError(f"{op}: split belongs to grid; freqs hold the angles already")
    if rotary_dim is not None:
        _check_rotary_dim(op, rotary_dim, E)
    cos, sin = _freqs(op, "freqs", freqs, q, rotary_dim, text_len)
    _check_rotary_dim(op, 2 * cos.shape[-1], E)
    if k_freqs is not None:
        return cos, sin, *_freqs(op, "k_freqs", k_freqs, k, 2 * cos.shape[-1], text_len), None
    if k.shape[2] != q.shape[2] and cos.ndim > 2 and cos.shape[-2] != 1:
        raise ValueError(
            f"{op}: freqs have angles of each head: k must have q's {q.shape[2]} heads; got {k.shape[2]}; pass k_freqs"
        )
    return cos, sin, None, None, None


def _check_rotary_dim(op, rotary_dim, E) -> None:
    if not _check.is_integer(rotary_dim) or rotary_dim % 2 or not 0 < rotary_dim <= E:
        raise ValueError(
            f"{op}: rotary_dim must be even, above 0 and at most the head width E={E}; got {rotary_dim!r}; "
            "pass rotary_dim= to rotate only the first channels of each head"
        )


def _check_grid(op, S, E, grid, tokens, split, rotary_dim, origin, text_len):
    """(*grid, *split, *origin), three integers each, then, if they are given, the two of tokens."""
    origin = _check.triple(op, "origin", origin, least=-(1 << 30))
    rotary_dim = E if rotary_dim is None else rotary_dim
    _check_rotary_dim(op, rotary_dim, E)
    T, H, W = grid = _check.triple(op, "grid", grid)
    tokens = () if tokens is None else _check_tokens(op, tokens, T * H * W)
    video = tokens[1] - tokens[0] if tokens else T * H * W
    if video + text_len != S:
        given = f"tokens {tokens} of grid" if tokens else "grid"
        raise ValueError(f"{op}: {given} {grid} and text_len {text_len} make {video + text_len} tokens; q has S={S}")
    split = _check.triple(op, "split", reference.default_split(rotary_dim) if split is None else split, least=0)
    if sum(split) != rotary_dim // 2:
        raise ValueError(f"{op}: split {split} must sum to rotary_dim/2 = {rotary_dim // 2}; got {sum(split)}")
    return *grid, *split, *origin, *tokens


def _check_tokens(op, tokens, count) -> tuple[int, int]:
    if not (isinstance(tokens, tuple | list) and len(tokens) == 2 and all([_check.is_integer(n) for n in tokens])):
        raise ValueError(f"{op}: tokens must be two integers (start, stop); got {tokens!r}")
    start, stop = [n if isinstance(n, torch.SymInt) else int(n) for n in tokens]
    if not (start >= 0 and stop >= start and count >= stop):
        raise ValueError(f"{op}: tokens (start, stop) must lie in the grid's {count}, in order; got {(start, stop)}")
    return start, stop


_check_grid_once = functools.lru_cache(maxsize=256)(_check_grid)  # a model asks the same for each of its layers


def _not_for_cuda(given: dict, tables: list, axes, by_width: bool, interleaved: bool) -> str | None:
    """Why the kernel of csrc/cuda/qknorm_rope.cu does not take these tensors: a thread holds two vectors of a head."""
    q, k = given["q"], given["k"]
    E, heads, vec = q.shape[3], max(q.shape[2], k.shape[2]), 16 // q.element_size()
    pairs = sum(axes[3:6]) if axes else 0 if tables[0] is None else tables[0].shape[-1]
    whole = vec // 2 if interleaved else vec
    if E % (2 * vec) or pairs % whole:
        how = "interleaved pairs" if interleaved else "pairs of split halves"
        return (
            f"cuda takes {q.dtype} heads of a multiple of {2 * vec} channels with a multiple of {whole} {how} that "
            f"turn; got {E} with {pairs}"
        )
    if axes and pairs > CUDA_ANGLES:
        return f"cuda computes the angles of up to {CUDA_ANGLES} pairs; got {pairs}; pass freqs"
    lanes = 1 << max(E // (2 * vec) - 1, 0).bit_length()  # threads of a head
    together = by_width or heads <= 1
    if lanes > (256 if together else 32) or (together and -(-heads // (256 // lanes)) > 32 // vec):
        over = f"the width of {heads} heads of {E}" if together else f"heads of {E}"
        return f"cuda holds up to 16384 channels of a width, 64 of a thread, and heads of {64 * vec}; got {over}"
    names = ("freqs[0]", "freqs[1]", "k_freqs[0]", "k_freqs[1]")
    for name, t in (*given.items(), *zip(names, tables, strict=True)):
        if t is None or t.stride(-1) != 1 or (name in names and t.dtype != torch.float32):
            continue  # what kernels are given is a copy
        step = whole if name in names else 16 // t.element_size()
        steps = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
        if t.storage_offset() % step or any([stride % step for stride in steps]):
            return (
                f"cuda takes strides and offsets that are multiples of {step} elements; got {name} with strides "
                f"{tuple(t.stride())} and offset {t.storage_offset()}"
            )
    return None


def _no_gradients_in_cuda(q, k, norm, stats, tables: list, axes, by_width: bool, interleaved: bool) -> str | None:
    """Why that of csrc/cuda/qknorm_rope_backward.cu does not: a thread holds two vectors of 8 channels of a head."""
    E, heads, whole = q.shape[3], max(q.shape[2], k.shape[2]), 4 if interleaved else 8
    pairs = sum(axes[3:6]) if axes else 0 if tables[0] is None else tables[0].shape[-1]
    if norm == "layer" or stats is not None or tables[2] is not None:
        return "cuda's backward takes norm='rms' or None, and neither stats nor k_freqs"
    if tables[0] is not None and tables[0].ndim > 2 and tables[0].shape[-2] != 1:
        return "cuda's backward takes angles that all heads share; got freqs of each head"
    if E % 16 or pairs % whole or pairs > CUDA_ANGLES:
        return (
            f"cuda's backward takes heads of a multiple of 16 channels and up to {CUDA_ANGLES} pairs that turn, a "
            f"multiple of {whole}; got {E} with {pairs}"
        )
    lanes = 1 << max(E // 16 - 1, 0).bit_length()  # threads of a head
    if (heads * lanes if by_width or heads <= 1 else 16 * lanes) > 512:
        return f"cuda's backward takes a width of up to 8192 channels, and heads of 512; got {heads} heads of {E}"
    return None


def _freqs(op, name, freqs, x, rotary_dim, text_len) -> tuple[Tensor, Tensor]:
    """The tables for x, whose rows of a (batch,) token (and head) count from the first token that turns."""
    if not (isinstance(freqs, tuple | list) and len(freqs) == 2):
        raise TypeError(f"{op}: {name} must be a pair (cos, sin); got {type(freqs).__name__}")
    B, S, H, _ = x.shape
    for i, t in enumerate(freqs):
        item = f"{name}[{i}]"
        _check.tensor(op, item, t, FREQS)
        if t.ndim not in (2, 3, 4):
            raise ValueError(f"{op}: {item} must be {FREQS}; got shape {_check.shape_of(t)}")
        shape = freqs[0].shape
        pairs = shape[-1] if rotary_dim is None else rotary_dim // 2
        clips, heads = (1 if n == 1 else full for n, full in ((shape[0], B), (shape[-2], H)))
        expected = (S - text_len, pairs), (S - text_len, H, pairs), (clips, S - text_len, heads, pairs)
        _check.exact(op, item, t, expected[len(shape) - 2], f"{FREQS}, tokens = S - text_len")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {item} asks for a gradient, but angles are constants here; pass it .detach()ed")
    _check.same_device(op, x, {f"{name}[0]": freqs[0], f"{name}[1]": freqs[1]}, "q")
    return tuple(freqs)


# The private ops

_ARGS = (
    "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? stats, "
    "Tensor? cos, Tensor? sin, Tensor? k_cos, Tensor? k_sin, int norm, bool width, SymInt[]? axes, float theta, "
    "SymInt first, bool interleaved, float eps, SymInt q_channels, SymInt k_channels"
)


def _impls(op: str, kernels: str = "kernels") -> dict[str, str | None]:
    return {"triton": f".qknorm_rope.{kernels}:{op}", "cpu": None}


_LEAVES = ("q", "k", "q_weight", "k_weight", "q_bias", "k_bias", "stats")
_N = len(_LEAVES)


def _keywords(
    cos, sin, k_cos, k_sin, norm, width, axes, theta, first, interleaved, eps, q_channels, k_channels, host=False
) -> dict:
    """axes: of t, h and w the size, then the pairs, then the origin; then (start, stop) where not all tokens are here;
    or None. channels: on all ranks; those of k follow from those of q."""
    axes = axes or ()
    return dict(
        norm=NORMS[norm], across="width" if width else "head", width=q_channels, grid=axes[:3] or None, split=axes[3:6],
        theta=theta, freqs=None if cos is None else (cos, sin), k_freqs=None if k_cos is None else (k_cos, k_sin),
        origin=axes[6:9], tokens=axes[9:] or None, text_len=first, text_at="start", interleaved=interleaved, eps=eps,
        rounding="host" if host else "once",
    )  # fmt: skip


def _forward(*args) -> None:
    inputs, settings, (q_out, k_out) = args[:_N], args[_N:-2], args[-2:]
    results = reference.qk_norm_rope(**dict(zip(_LEAVES, inputs, strict=True)), **_keywords(*settings))
    q_out.copy_(results[0])
    k_out.copy_(results[1])


def _backward(dq_out, dk_out, *args) -> None:
    inputs, settings, grads = args[:_N], args[_N:-_N], args[-_N:]
    keywords = _keywords(*settings)
    _library.vjp(
        lambda **inputs: reference.qk_norm_rope(**inputs, **keywords),
        dict(zip(_LEAVES, inputs, strict=True)),
        (dq_out, dk_out),
        dict(zip(_LEAVES, grads, strict=True)),
    )


_library.define(
    "qk_norm_rope_fwd",
    f"({_ARGS}, bool host, Tensor(a!) q_out, Tensor(b!) k_out) -> ()",
    reference=_forward,
    impls=_impls("qk_norm_rope_fwd") | {"cuda": None},
)
_library.define(
    "qk_norm_rope_bwd",
    f"(Tensor dq_out, Tensor dk_out, {_ARGS}, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dq_weight, "
    "Tensor(d!)? dk_weight, Tensor(e!)? dq_bias, Tensor(f!)? dk_bias, Tensor(g!)? dstats) -> ()",
    reference=_backward,
    impls=_impls("qk_norm_rope_bwd") | {"cuda": None},
)


def _inputs(q, k, q_weight, k_weight, q_bias, k_bias, stats, cos, sin, k_cos, k_sin) -> tuple[Tensor | None, ...]:
    if cos is not None:
        cos, sin = _alike(q, cos, sin)
    if k_cos is not None:
        k_cos, k_sin = _alike(k, k_cos, k_sin)
    return (
        dense(q), dense(k), parameter(q_weight), parameter(k_weight), parameter(q_bias), parameter(k_bias),
        stats, cos, sin, k_cos, k_sin,
    )  # fmt: skip


def _alike(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables in the dtype of the mathematics on x, dense in their last axis and of the same strides."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    cos, sin = dense(cos.to(dtype)), dense(sin.to(dtype))
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _qk_norm_rope(*args, out=None) -> tuple[Tensor, Tensor]:
    *tensors, (*settings, impl) = args
    q_out, k_out = (like(tensors[0]), like(tensors[1])) if out is None else out
    _library.call("qk_norm_rope_fwd", impl)(*_inputs(*tensors), *settings, q_out, k_out)
    return q_out, k_out


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def formula(*args):
        tensors, tables, (*settings, _) = args[:_N], args[_N:-1], args[-1]
        return reference.qk_norm_rope(**dict(zip(_LEAVES, tensors, strict=True)), **_keywords(*tables, *settings))

    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.settings = args
        ctx.save_for_backward(*tensors)
        return _qk_norm_rope(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        *settings, _, impl = ctx.settings
        inputs = _inputs(*ctx.saved_tensors)  # once: activation checkpointing unpacks a tensor a single time
        grads = [like(t, wanted) for t, wanted in zip(inputs[:_N], ctx.needs_input_grad[:_N], strict=True)]
        _library.call("qk_norm_rope_bwd", impl)(dense(dq_out), dense(dk_out), *inputs, *settings, *grads)
        return *grads, *(None for _ in range(5))


# qk_norm_stats

_library.define(
    "qk_norm_stats_fwd",
    "(Tensor q, Tensor k, Tensor(a!) stats) -> ()",
    reference=lambda q, k, stats: stats.copy_(reference.qk_norm_stats(q, k)),
    impls=_impls("qk_norm_stats_fwd", "kernels_stats"),
)
_library.define(
    "qk_norm_stats_bwd",
    "(Tensor dstats, Tensor q, Tensor k, Tensor(a!)? dq, Tensor(b!)? dk) -> ()",
    reference=lambda dstats, q, k, dq, dk: _library.vjp(
        reference.qk_norm_stats, dict(q=q, k=k), (dstats,), dict(q=dq, k=dk)
    ),
    impls=_impls("qk_norm_stats_bwd", "kernels_stats"),
)


def _qk_norm_stats(q, k, impl) -> Tensor:
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    stats = q.new_empty((q.shape[0], q.shape[1] + k.shape[1]), dtype=dtype)
    _library.call("qk_norm_stats_fwd", impl)(dense(q), dense(k), stats)
    return stats


class _QKNormStats(torch.autograd.Function):
    @staticmethod
    def formula(q, k, impl):
        return reference.qk_norm_stats(q, k)

    @staticmethod
    def forward(ctx, q, k, impl):
        ctx.save_for_backward(q, k)
        ctx.impl = impl
        return _qk_norm_stats(q, k, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dstats):
        q, k = ctx.saved_tensors
        dq, dk = (like(t, wanted) for t, wanted in zip((q, k), ctx.needs_input_grad, strict=False))
        _library.call("qk_norm_stats_bwd", ctx.impl)(dstats, dense(q), dense(k), dq, dk)
        return dq, dk, None
