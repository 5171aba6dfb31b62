"""adaLN modulation: norm, scale, shift and gated residual over tokens, in one pass, with deterministic gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, _dispatch, _library, _rows
from .._autograd import apply, needs_grad, once_differentiable
from .._operands import dense, like, narrow, parameter, table, written
from . import reference

NORMS = ("layer", "rms")
CUDA_ROW = 16384  # of csrc/cuda/modulation_gate.cu: what the registers of a block hold
CUDA_NORMED = {2: 6144, 4: 4608}  # of csrc/cuda/modulation_backward.cuh, by bytes of an element: as well
MAX_WIDTH = 65536  # of a row, in the registers of a Triton program


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "once",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """norm(x) · (1 + scale + scale_table) + (shift + shift_table)

        norm="layer":  norm(x) = (x − mean(x)) / √(var(x) + eps) · weight + bias     (biased variance, over D)
        norm="rms":    norm(x) = x / √(mean(x²) + eps) · weight + bias

    x                        [B, S, D], float32, bfloat16, float16 (float64 in `reference`), any strides
    shift, scale             one of [D], [B, D], [B, 1, D], [B, F, D] with F dividing S (each of F frames' S/F
                             consecutive tokens shares a row), [B, S, D], with 1 instead of B for rows of every
                             clip; any strides, any float dtype; None: absent
    weight, bias             [D], any float dtype
    shift_table, scale_table [D], float32, added to the rows inside the kernel
    index                    [B, S], int32 or int64, any strides: token s of clip b has row index[b, s] of shift and
                             scale, which are then [R, D], [B, R, D] or [D]; none is written out per token. Beyond R: an
                             error on the CPU; on a GPU it is not looked at, and such a token has rows of zeros
    rounding                 "once", at the store; or as a "host" that computes in 16 bits: the norm, then 1 + scale and
                             its product, where these are of x's dtype, and at the store. Nearer to that model, further
                             from fp64. Gradients are the same. In `reference` and `triton`
    out                      where to write (x's shape, dtype and device, dense in D, no memory of an input); for
                             inference only. This is the workspace: a large result costs fresh pages at every call, a
                             buffer that layers share none
    impl                     "auto", "reference", "cpu", "triton" or "cuda" (executed, not yet run on a GPU: "auto"
                             never takes it)

    Returns [B, S, D] in x's dtype. Statistics, products and sums are fp32, rounded once at the store; error against
    fp64 ≤ 2 × that of plain PyTorch in the same dtype plus one rounding. The backward recomputes the statistics from x,
    reduces each gradient to exactly the shape given, in fp32 and in a fixed order: two runs agree bit for bit. In
    compiled `triton` two memory layouts do so only where rows begin at multiples of 16 elements, as contiguous ones of
    such a D do: the compiler orders sums by what it knows of the addresses.
    Forward mode, torch.func and, under it, higher orders: by the reference's formula (docs/numerics.md).

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Source: adaLN of Peebles & Xie, arXiv 2212.09748; tables of PixArt-α, arXiv 2310.00426.
    """
    op = "norm_modulate"
    eps = _check_norm(op, x, norm, eps)
    if index is None:
        frames = _rows.check(op, x, shift=shift, scale=scale)
    else:
        frames, (shift, scale) = _rows.chosen(op, x, index, shift=shift, scale=scale)
    _check_vectors(op, x, weight=weight, bias=bias, shift_table=shift_table, scale_table=scale_table)
    tensors = narrow(x, (x, shift, scale, weight, bias, shift_table, scale_table, index))
    grad = _needs_grad(op, tensors, out)
    host = _host(op, rounding, x, norm=(shift, scale, shift_table, scale_table))
    impl = _choose(op, impl, x, grad, host, index)
    settings = (frames, norm == "rms", eps, host, impl)
    return apply(_NormModulate, *tensors, settings) if grad else _norm_modulate(*tensors, *settings, out)


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    *,
    gate_table: Tensor | None = None,
    y_norm: str | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "once",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """x + (gate + gate_table) · y;  with a y_norm x + (gate + gate_table) · norm(y)

    x, y        [B, S, D] of one dtype, any strides
    gate        a modulation row as in `norm_modulate`; None: 1. Of a gate that is squashed give the value, gate.tanh():
                rows are small. So is the product with the weight of a norm of y, gate · weight
    gate_table  [D], float32, beside a gate
    y_norm      "layer" or "rms": y is normalised first, as x is in `norm_modulate`, with eps
    index       [B, S]: token s of clip b has row index[b, s] of gate, as in `norm_modulate`
    rounding    as in `norm_modulate`; a "host" rounds gate · y where gate is of x's dtype
    out         where to write; may be x or y itself; for inference only
    impl        as in `norm_modulate`; "cuda": no index, rows of whole 16 bytes and up to 16384 values

    Returns [B, S, D] in x's dtype. Contract of numbers, determinism and errors: see `norm_modulate`.
    """
    op = "gate_residual"
    _check.tensor(op, "x", x, "[B, S, D]", ndim=3)
    _check.like(op, "y", y, x)
    y_rms = _check_gate(op, gate, gate_table, y_norm)
    eps = _check.positive(op, "eps", eps)
    if index is None:
        frames = _rows.check(op, x, gate=gate)
    else:
        frames, (gate,) = _rows.chosen(op, x, index, gate=gate)
    _check_vectors(op, x, gate_table=gate_table)
    tensors = narrow(x, (x, y, gate, gate_table, index))
    grad = _needs_grad(op, tensors, out, over=2)
    host = _host(op, rounding, x, gate=(gate, gate_table))
    read = dict(x=x, y=y, gate=gate, gate_table=gate_table, out=out)
    impl = _choose(op, impl, x, grad, host, index, read, held=y_rms is not None)
    settings = (frames, y_rms, eps, host, impl)
    return apply(_GateResidual, *tensors, settings) if grad else _gate_residual(*tensors, *settings, out)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    norm: str = "layer",
    y_norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "once",
    out: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x_new = gate_residual(x, y, gate, ...);  out = norm_modulate(x_new, shift, scale, ...)

    The end of one branch and the beginning of the next in a single pass: x and y are read once. Arguments as in
    `gate_residual` and `norm_modulate`; one eps serves both norms, one index all rows. x_new is rounded to its dtype
    before it is normalised, so the result is that of the two functions called one after another. `out` is a pair
    (x_new, out) to write into, for inference only; its first may be x or y itself. impl as in `gate_residual`.

    Returns (x_new, out), both [B, S, D] in x's dtype. Numbers, determinism and errors: see `norm_modulate`.
    """
    op = "gate_residual_norm_modulate"
    eps = _check_norm(op, x, norm, eps)
    _check.like(op, "y", y, x)
    y_rms = _check_gate(op, gate, gate_table, y_norm)
    if index is None:
        frames = _rows.check(op, x, gate=gate, shift=shift, scale=scale)
    else:
        frames, (gate, shift, scale) = _rows.chosen(op, x, index, gate=gate, shift=shift, scale=scale)
    _check_vectors(
        op, x, weight=weight, bias=bias, gate_table=gate_table, shift_table=shift_table, scale_table=scale_table
    )
    tensors = narrow(x, (x, y, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table, index))
    if out is not None and not (isinstance(out, tuple) and len(out) == 2 and out[0] is not out[1]):
        raise ValueError(f"{op}: out must be a pair of two tensors (x_new, out); got {type(out).__name__}")
    grad = _needs_grad(op, tensors, out, over=2)
    host = _host(op, rounding, x, norm=(shift, scale, shift_table, scale_table), gate=(gate, gate_table))
    names = "x", "y", "gate", "shift", "scale", "weight", "bias", "gate_table", "shift_table", "scale_table"
    read = dict(zip(names, tensors, strict=False)) | dict(zip(("x_new", "out"), out or (), strict=False))
    impl = _choose(op, impl, x, grad, host, index, read)
    settings = (frames, norm == "rms", y_rms, eps, host, impl)
    if grad:
        return apply(_GateResidualNormModulate, *tensors, settings)
    return _gate_residual_norm_modulate(*tensors, *settings, out)


# Validation and choice


def _check_norm(op, x, norm, eps) -> float:
    """eps."""
    _check.tensor(op, "x", x, "[B, S, D]", ndim=3)
    _check.choice(op, "norm", norm, NORMS)
    return _check.positive(op, "eps", eps)


def _check_gate(op, gate, gate_table, y_norm) -> bool | None:
    """Whether y's norm is an RMS norm; None where it has none."""
    if gate is None and gate_table is not None:
        raise ValueError(f"{op}: gate_table is added to a gate; got gate=None; give the table as the gate")
    if y_norm is None:
        return None
    _check.choice(op, "y_norm", y_norm, (None, *NORMS))
    return y_norm == "rms"


def _check_vectors(op, x, **vectors: Tensor | None) -> None:
    """Parameters and tables."""
    for name, t in vectors.items():
        if t is not None:
            _check.exact(op, name, t, (x.shape[2],), "[D], the width of x")
            _check.same_device(op, x, {name: t})


def _host(op, rounding, x, norm=None, gate=None) -> int:
    """What a host rounds besides the result, as `reference` numbers it: PyTorch gives an operation the widest dtype of
    its operands, so beside rows or tables in fp32 only the norm is rounded."""
    if isinstance(rounding, str) and rounding == "once":
        return 0
    _check.choice(op, "rounding", rounding, ("once", "host"))
    if x.dtype not in (torch.bfloat16, torch.float16):
        return 0
    of_x = [rows is not None and all([t is None or t.dtype == x.dtype for t in rows]) for rows in (norm, gate)]
    return (norm is not None) + 2 * of_x[0] + 4 * of_x[1]


def _choose(op, impl, x, grad, host, index=None, whole: dict[str, Tensor | None] | None = None, held=True) -> str:
    """whole: what cuda takes in vectors of 16 bytes alone. held: its gradients hold rows, for a norm."""
    wide = _dispatch.within(MAX_WIDTH, x.shape[2], "rows")

    def limits(name: str) -> str | None:
        if host and name in ("cpu", "cuda"):
            return f"{name} rounds once, at the store"
        if index is not None and name == "cuda":
            return "cuda takes no index"
        if whole is not None and name == "cuda" and (reason := _not_whole(x, whole)):
            return reason
        if grad and held and name == "cuda":
            most, D = CUDA_NORMED.get(x.element_size(), 0), x.shape[2]
            if D > most or D * x.element_size() % 16:
                values = f"at most {most} values of {x.dtype}"
                return f"cuda's backward takes rows of whole 16 bytes and of {values}; got {D}"
        return wide and wide(name)

    return _dispatch.choose(op, impl, x, grad=grad, limits=limits)


def _not_whole(x: Tensor, tensors: dict[str, Tensor | None]) -> str | None:
    """Why rows of these are not vectors of 16 bytes, or of as many elements as x has in them."""
    vec, D = 16 // x.element_size(), x.shape[2]
    if D % vec or D > CUDA_ROW:
        return f"cuda takes rows of whole 16 bytes and of at most {CUDA_ROW} values; got {D}"
    for name, t in tensors.items():
        if t is None or t.stride(-1) != 1:  # what is not dense is copied
            continue
        at = min(vec, 16 // t.element_size())
        outer = [step for step, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1]
        if t.storage_offset() % at or any(step % at for step in outer):
            got = f"strides {t.stride()} and offset {t.storage_offset()}"
            return f"cuda takes rows that begin at multiples of {at} elements; got {name} with {got}"
    return None


def _needs_grad(op, tensors, out: Tensor | tuple[Tensor, Tensor] | None, over: int = 0) -> bool:
    """The first result may be written over one of the first `over` tensors."""
    if out is None:
        return needs_grad(tensors)
    outs = out if op == "gate_residual_norm_modulate" else (out,)
    written(op, outs, (("x", tensors[0]),) * len(outs), tensors, over)
    return False


# norm_modulate

def _norm_modulate_formula(
    x, shift, scale, weight, bias, shift_table, scale_table, index, rms, eps, host
) -> Tensor:  # fmt: skip
    kwargs = dict(weight=weight, bias=bias, shift_table=shift_table, scale_table=scale_table, index=index)
    return reference.norm_modulate(x, shift, scale, norm=NORMS[rms], **kwargs, eps=eps, host=host)


_library.define(
    "norm_modulate_fwd",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? shift_table, Tensor? scale_table, "
    "Tensor? index, bool rms, float eps, int host, Tensor(a!) out) -> ()",
    reference=lambda *args: args[-1].copy_(_norm_modulate_formula(*args[:-1])),
    impls={"triton": ".modulation.kernels:norm_modulate_fwd", "cuda": None, "cpu": None},
)  # fmt: skip


def _norm_modulate_bwd(
    dout, x, scale, weight, bias, scale_table, index, rms, eps,
    dx, dshift, dscale, dweight, dbias, dshift_table, dscale_table,
):  # fmt: skip
    D = x.shape[-1]
    zeros = dout.new_zeros
    inputs = dict(
        x=x, shift=zeros(D) if dshift is None else zeros(dshift.shape), scale=scale, weight=weight, bias=bias,
        shift_table=zeros(D), scale_table=scale_table,
    )  # fmt: skip
    _library.vjp(
        lambda x, **kw: reference.norm_modulate(x, norm=NORMS[rms], index=index, eps=eps, **kw),
        inputs,
        (dout,),
        dict(
            x=dx, shift=dshift, scale=dscale, weight=dweight, bias=dbias,
            shift_table=dshift_table, scale_table=dscale_table,
        ),
    )  # fmt: skip


_library.define(
    "norm_modulate_bwd",
    "(Tensor dout, Tensor x, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? scale_table, Tensor? index, "
    "bool rms, float eps, "
    "Tensor(a!)? dx, Tensor(b!)? dshift, Tensor(c!)? dscale, Tensor(d!)? dweight, Tensor(e!)? dbias, "
    "Tensor(f!)? dshift_table, Tensor(g!)? dscale_table) -> ()",
    reference=_norm_modulate_bwd,
    impls={"triton": ".modulation.kernels:norm_modulate_bwd", "cuda": None, "cpu": None},
)


def _norm_modulate(
    x, shift, scale, weight, bias, shift_table, scale_table, index, frames, rms, eps, host, impl, out=None
) -> Tensor:
    out = like(x) if out is None else out
    _library.call("norm_modulate_fwd", impl)(
        dense(x), _rows.operand(shift, x, frames), _rows.operand(scale, x, frames), parameter(weight), parameter(bias),
        table(shift_table, x), table(scale_table, x), index, rms, eps, host, out,
    )  # fmt: skip
    return out


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def formula(*args):
        *tensors, (_, *settings, _) = args
        return _norm_modulate_formula(*tensors, *settings)

    @staticmethod
    def forward(ctx, x, shift, scale, weight, bias, shift_table, scale_table, index, settings):
        ctx.save_for_backward(x, shift, scale, weight, bias, shift_table, scale_table, index)
        ctx.settings = settings
        return _norm_modulate(x, shift, scale, weight, bias, shift_table, scale_table, index, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, shift, scale, weight, bias, shift_table, scale_table, index = ctx.saved_tensors
        frames, rms, eps, _, impl = ctx.settings
        need = ctx.needs_input_grad
        dx = like(x, need[0])
        dshift = _rows.like(shift, need[1] or not _rows.told_by(shift, scale), x, frames)
        dscale = _rows.like(scale, need[2], x, frames)
        dweight, dbias = like(weight, need[3]), like(bias, need[4])
        dshift_table = like(shift_table, need[5] or not _rows.told_by(shift_table, scale_table))
        dscale_table = like(scale_table, need[6])
        index = _rows.index_of(index, scale, dshift)
        _library.call("norm_modulate_bwd", impl)(
            dense(dout), dense(x), _rows.view(scale, x, frames), parameter(weight), parameter(bias),
            table(scale_table, x), index, rms, eps, dx, dshift, dscale, dweight, dbias, dshift_table, dscale_table,
        )  # fmt: skip
        dshift, dscale = _rows.sum_to(dshift, shift), _rows.sum_to(dscale, scale)
        return dx, dshift, dscale, dweight, dbias, dshift_table, dscale_table, None, None


# gate_residual

def _gate_residual_formula(x, y, gate, gate_table, index, y_rms, eps, host) -> Tensor:
    kwargs = dict(gate_table=gate_table, y_norm=y_rms if y_rms is None else NORMS[y_rms], index=index)
    return reference.gate_residual(x, y, gate, **kwargs, eps=eps, host=host)


def _gate_residual_bwd(dout, y, gate, gate_table, index, y_rms, eps, dy, dgate, dgate_table):
    zeros = torch.zeros_like(dout)
    _library.vjp(
        lambda **kw: _gate_residual_formula(zeros, **kw, index=index, y_rms=y_rms, eps=eps, host=0),
        dict(y=y, gate=gate, gate_table=gate_table),
        (dout,),
        dict(y=dy, gate=dgate, gate_table=dgate_table),
    )


_library.define(
    "gate_residual_fwd",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? gate_table, Tensor? index, bool? y_rms, float eps, int host, "
    "Tensor(a!) out) -> ()",
    reference=lambda *args: args[-1].copy_(_gate_residual_formula(*args[:-1])),
    impls={"triton": ".modulation.kernels:gate_residual_fwd", "cuda": None, "cpu": None},
)  # fmt: skip
_library.define(
    "gate_residual_bwd",
    "(Tensor dout, Tensor y, Tensor? gate, Tensor? gate_table, Tensor? index, bool? y_rms, float eps, "
    "Tensor(a!)? dy, Tensor(b!)? dgate, Tensor(c!)? dgate_table) -> ()",
    reference=_gate_residual_bwd,
    impls={"triton": ".modulation.kernels:gate_residual_bwd", "cuda": None, "cpu": None},
)


def _gate_residual(x, y, gate, gate_table, index, frames, y_rms, eps, host, impl, out=None) -> Tensor:
    out = like(x) if out is None else out
    gate = _rows.operand(gate, x, frames)
    _library.call("gate_residual_fwd", impl)(
        dense(x), dense(y), gate, table(gate_table, x), index, y_rms, eps, host, out
    )
    return out


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def formula(*args):
        *tensors, (_, *settings, _) = args
        return _gate_residual_formula(*tensors, *settings)

    @staticmethod
    def forward(ctx, x, y, gate, gate_table, index, settings):
        ctx.save_for_backward(y, gate, gate_table, index)
        ctx.settings = settings
        return _gate_residual(x, y, gate, gate_table, index, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, gate, gate_table, index = ctx.saved_tensors
        need = ctx.needs_input_grad
        frames, y_rms, eps, _, impl = ctx.settings
        if not any(need[1:4]):
            return dout, *[None] * 5
        if gate is None and y_rms is None:
            return dout, dout, *[None] * 4
        dy, dgate = like(y, need[1]), _rows.like(gate, need[2], y, frames)
        dgate_table = like(gate_table, need[3])
        _library.call("gate_residual_bwd", impl)(
            dense(dout), dense(y), _rows.view(gate, y, frames), table(gate_table, y), index, y_rms, eps,
            dy, dgate, dgate_table,
        )  # fmt: skip
        return dout, dy, _rows.sum_to(dgate, gate), dgate_table, None, None


# gate_residual_norm_modulate

def _gate_residual_norm_modulate_formula(
    x, y, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table, index, rms, y_rms, eps, host
) -> tuple[Tensor, Tensor]:
    x = _gate_residual_formula(x, y, gate, gate_table, index, y_rms, eps, host)
    tables = shift_table, scale_table
    return x, _norm_modulate_formula(x, shift, scale, weight, bias, *tables, index, rms, eps, host)


def _gate_residual_norm_modulate_fwd(*args):
    *inputs, x_new, out = args
    for destination, result in zip((x_new, out), _gate_residual_norm_modulate_formula(*inputs), strict=True):
        destination.copy_(result)


def _gate_residual_norm_modulate_bwd(
    dx_new, dout, x_new, y, gate, scale, weight, bias, gate_table, scale_table, index, rms, y_rms, eps,
    dx, dy, dgate, dshift, dscale, dweight, dbias, dgate_table, dshift_table, dscale_table,
):  # fmt: skip
    total = torch.zeros(x_new.shape, dtype=torch.promote_types(x_new.dtype, torch.float32), device=x_new.device)
    if dout is not None:
        _norm_modulate_bwd(
            dout, x_new, scale, weight, bias, scale_table, index, rms, eps,
            total, dshift, dscale, dweight, dbias, dshift_table, dscale_table,
        )  # fmt: skip
    else:
        for t in (dshift, dscale, dweight, dbias, dshift_table, dscale_table):
            if t is not None:
                t.zero_()
    if dx_new is not None:
        total += dx_new
    if dx is not None:
        dx.copy_(total)
    _gate_residual_bwd(total, y, gate, gate_table, index, y_rms, eps, dy, dgate, dgate_table)


_library.define(
    "gate_residual_norm_modulate_fwd",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    "Tensor? gate_table, Tensor? shift_table, Tensor? scale_table, Tensor? index, bool rms, bool? y_rms, float eps, "
    "int host, Tensor(a!) x_new, Tensor(b!) out) -> ()",
    reference=_gate_residual_norm_modulate_fwd,
    impls={"triton": ".modulation.kernels:gate_residual_norm_modulate_fwd", "cuda": None, "cpu": None},
)
_library.define(
    "gate_residual_norm_modulate_bwd",
    "(Tensor? dx_new, Tensor? dout, Tensor x_new, Tensor y, Tensor? gate, Tensor? scale, Tensor? weight, Tensor? bias, "
    "Tensor? gate_table, Tensor? scale_table, Tensor? index, bool rms, bool? y_rms, float eps, "
    "Tensor(a!)? dx, Tensor(b!)? dy, Tensor(c!)? dgate, Tensor(d!)? dshift, Tensor(e!)? dscale, Tensor(f!)? dweight, "
    "Tensor(g!)? dbias, Tensor(h!)? dgate_table, Tensor(i!)? dshift_table, Tensor(j!)? dscale_table) -> ()",
    reference=_gate_residual_norm_modulate_bwd,
    impls={"triton": ".modulation.kernels:gate_residual_norm_modulate_bwd", "cuda": None, "cpu": None},
)


def _gate_residual_norm_modulate(
    x, y, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table, index,
    frames, rms, y_rms, eps, host, impl, out=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_new, out = (like(x), like(x)) if out is None else out
    _library.call("gate_residual_norm_modulate_fwd", impl)(
        dense(x), dense(y), _rows.operand(gate, x, frames), _rows.operand(shift, x, frames),
        _rows.operand(scale, x, frames), parameter(weight), parameter(bias),
        table(gate_table, x), table(shift_table, x), table(scale_table, x), index, rms, y_rms, eps, host, x_new, out,
    )  # fmt: skip
    return x_new, out


class _GateResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def formula(*args):
        *tensors, (_, *settings, _) = args
        return _gate_residual_norm_modulate_formula(*tensors, *settings)

    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table, index, settings):
        ctx.set_materialize_grads(False)
        tensors = (y, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table, index)
        x_new, out = _gate_residual_norm_modulate(x, *tensors, *settings)
        ctx.save_for_backward(x_new, *tensors)
        ctx.settings = settings
        return x_new, out

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new, dout):
        x_new, y, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table, index = ctx.saved_tensors
        frames, rms, y_rms, eps, _, impl = ctx.settings
        need = ctx.needs_input_grad
        dx, dy, dgate = like(x_new, need[0]), like(y, need[1]), _rows.like(gate, need[2], x_new, frames)
        dshift = _rows.like(shift, need[3] or not _rows.told_by(shift, scale), x_new, frames)
        dscale = _rows.like(scale, need[4], x_new, frames)
        dweight, dbias = like(weight, need[5]), like(bias, need[6])
        told = need[7], need[8] or not _rows.told_by(shift_table, scale_table), need[9]
        dtables = [like(t, n) for t, n in zip((gate_table, shift_table, scale_table), told, strict=True)]
        index = _rows.index_of(index, gate, scale, dshift)
        _library.call("gate_residual_norm_modulate_bwd", impl)(
            dense(dx_new), dense(dout), dense(x_new), dense(y), _rows.view(gate, x_new, frames),
            _rows.view(scale, x_new, frames), parameter(weight), parameter(bias),
            table(gate_table, x_new), table(scale_table, x_new), index, rms, y_rms, eps,
            dx, dy, dgate, dshift, dscale, dweight, dbias, *dtables,
        )  # fmt: skip
        dgate, dshift, dscale = _rows.sum_to(dgate, gate), _rows.sum_to(dshift, shift), _rows.sum_to(dscale, scale)
        return dx, dy, dgate, dshift, dscale, dweight, dbias, *dtables, None, None
