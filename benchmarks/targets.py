"""What we hold ourselves to, and which rows fall short of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

# On an H200 in bf16, (forward, backward): percent of the measured copy bandwidth, or useful TFLOP/s.
PERCENT_COPY = {
    "norm_modulate": (90, 80),
    "gate_heads": (85, 75),
    "gate_residual": (85, 75),
    "gate_residual_norm_modulate": (85, 75),
    "qk_norm_rope": (85, 75),
    "patch_embed3d": (80, 70),
    "final_layer": (80, 70),
    "norm_silu": (85, 75),
}
# Percent of the measured matmul rate, forward, by channels: from so many on, the widest first.
PERCENT_MATMUL = {"causal_conv3d": ((192, 75), (96, 60))}
NEVER_BELOW = {"causal_conv3d": "torch-cudnn"}  # forward and backward
TFLOP_S = {"spacetime_attention": (500, 400), "spacetime_attention:tiles": (None, 500)}

# On a CPU: times faster than eager and than torch.compile, by dtype, forward and backward.
SPEEDUP = {
    "norm_modulate": {"float32": (4, 1.3), "bfloat16": (6, 2)},
    "gate_residual_norm_modulate": {"float32": (4, 1.3), "bfloat16": (6, 2)},
    "qk_norm_rope": {"float32": (3, 2), "bfloat16": (3, 2)},
    "patch_embed3d": {"float32": (3, 1)},
    "final_layer": {"float32": (2, 1)},
    "norm_silu": {"float32": (4, 1)},
}

CALL_US = 15  # on a CPU, of a forward without gradients at the shape `tiny`: what Python does around the op
# Of the model, by op, shape and mode: times faster than diffusers, which eager and compile of a transformer are too. Of
# whole decodes on an H200: frames in a second.
FASTER_THAN = {
    ("vae_decode", "wan-32", "fwd"): ("diffusers", 1.5),
    ("vae_decode", "wan-96", "fwd"): ("diffusers", 1.25),
    ("dit", "dit-toy", "fwd"): ("eager", 1.3),
    ("dit_block", "dit-wan1.3b-small", "fwd"): ("eager", 1.15),
    ("dit", "dit-wan1.3b-step", "fwd+bwd"): ("compile", 1.3),
}
FRAMES_S = {("vae_decode", "wan-480p"): 81 / 0.6, ("vae_decode", "wan-720p"): 81 / 1.3}


def shortfalls(rows: Iterable[Row]) -> list[str]:
    """A line for each goal that our fastest implementation misses, and where triton is faster than cudnn or sdpa, which
    "auto" takes unless the table of its family says so. CPU goals need eager and compile in the same run; a loss to
    eager is forgiven up to the cost of the call alone, if that was measured in it."""
    cases: dict[tuple, dict[str, Row]] = defaultdict(dict)
    calls: dict[tuple, float] = {}
    for row in rows:
        if row["status"] == "ok":
            cases[row["op"], row["shape"], row["dtype"], row["mode"]][row["impl"]] = row
            if row["impl"] == "cpu+call":
                calls[row["op"], row["mode"]] = row["p50_us"]
    lines = []
    for (op, shape, dtype, mode), own in cases.items():
        ours = [row for row in own.values() if row["kind"] == "ours"]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["p50_us"])
        name = f"{op} {best['impl']} {mode} {dtype} at {shape}"
        for reached, goal, unit in _goals(best, own, op, dtype, mode):
            if goal is not None and reached < goal:
                lines.append(f"below its goal of {goal:g} {unit}: {name}, {reached:.3g}")
        for default in ("cudnn", "sdpa"):
            if {"triton", default} <= own.keys() and own["triton"]["p50_us"] < own[default]["p50_us"]:
                ratio, dims = own[default]["p50_us"] / own["triton"]["p50_us"], best["dims"] or {}
                size = ", ".join(f"{dims[name]} {name}" for name in ("channels", "width") if name in dims)
                lines.append(f"triton is faster than {default}: {op} {mode} {dtype} at {shape}, {size}, {ratio:.3g} x")
        if best["impl"] == "cpu" and "eager" in own:
            lost, call = best["p50_us"] - own["eager"]["p50_us"], calls.get((op, mode), 0.0)
            if lost > call:
                lines.append(f"slower than eager by more than its call of {call:.3g} µs: {name}, by {lost:.3g} µs")
        call = own.get("cpu+call")
        if call and mode == "fwd" and call["p50_us"] > CALL_US:
            lines.append(f"above its goal of {CALL_US} µs of Python a call: {name}, {call['p50_us']:.3g}")
    return lines


def _goals(best: Row, own: Mapping[str, Row], op: str, dtype: str, mode: str) -> list[tuple[float, float | None, str]]:
    """(reached, goal, unit) of one case."""
    if best["shape"] == "tiny":
        return []
    case = op, best["shape"]
    if (of_model := (*case, mode)) in FASTER_THAN:
        peer, goal = FASTER_THAN[of_model]
        return [(own[peer]["p50_us"] / best["p50_us"], goal, f"x {peer}")] if peer in own else []
    if best["impl"] == "cpu":
        faster = zip(("eager", "compile"), SPEEDUP.get(op, {}).get(dtype, (None, None)), strict=True)
        return [(own[n]["p50_us"] / best["p50_us"], goal, f"x {n}") for n, goal in faster if n in own]
    if best["impl"] == "reference" or dtype == "float32":
        return []
    if case in FRAMES_S:
        return [(best["dims"]["frames"] / best["p50_us"] * 1e6, FRAMES_S[case], "frames/s")]
    at = int(mode != "fwd")
    channels = (best["dims"] or {}).get("channels", 0)
    matmul = next((goal for least, goal in PERCENT_MATMUL.get(op, ()) if channels >= least and mode == "fwd"), None)
    rivals = [name for name in own if name == NEVER_BELOW.get(op)]
    return [
        *[(own[name]["p50_us"] / best["p50_us"], 1, f"x {name}") for name in rivals],
        (best["percent_matmul"], matmul, "% matmul"),
        (best["percent_copy"], PERCENT_COPY.get(op, (None, None))[at], "% copy"),
        (best["tflop_s"], TFLOP_S.get(op, (None, None))[at], "TFLOP/s"),
    ]
