"""One page that shows what `evaluate` found: tables, curves, and the clips side by side, all of it in one file."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import media
from .safety.credentials import Origin
from .world.measures import HORIZONS
from .world.measures_summary import rows_of
from .world.measures_text import CLAIMS

Clips = tuple[str, str, dict[str, np.ndarray]]
_HUES = ("#e34a5f", "#2b7de0", "#f08c1e", "#2ca25f", "#8452d6", "#13a3b8", "#9a7b4f")
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667; --line: #d9dce3; --paper: #fbfaf7; --card: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf0; --soft: #9aa0b0; --line: #333947; --paper: #14161c;
  --card: #1c2029; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1080px; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: .95rem; font-weight: 500; margin: 1.25rem 0 .4rem; } p { color: var(--soft); margin: .25rem 0 .75rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .32rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); display: block; font-size: .72rem; line-height: 1; }
.row { display: flex; flex-wrap: wrap; gap: .9rem; }
figure { margin: 0; width: 168px; } figcaption { font-size: .8rem; color: var(--soft); margin-top: .2rem; }
video { width: 168px; border-radius: 8px; display: block; background: var(--card); border: 1px solid var(--line); }
svg { background: var(--card); border: 1px solid var(--line); border-radius: 8px; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
"""


def write_page(
    path: str | os.PathLike[str],
    result: Mapping[str, Any],
    clips: Sequence[Clips],
    fps: float,
    folder: Path | None = None,
) -> None:
    """Writes the page of a result of `evaluate`, and of the clips that it kept, to the empty file at `path`. Each clip
    in it carries credentials of its own; those of the checkpoint in `folder` are marked."""
    made = {name: result[name] for name in ("seed", "steps", "guidance")}
    model = Origin.of(folder, **made)
    parts = [f"<h1>What the world says of a checkpoint</h1><p>{_settings(result)}</p>", _text(result)]
    if "continuation" in result:
        parts += [_measures(result), _horizons(result["continuation"]), _permanence(result["permanence"])]
    if "length" in result:
        parts.append(_length(result["length"], result["length_means"]))
    for verb, by_name in result.get("verbs", {}).items():
        parts.append(f"<h2>{html.escape(verb.capitalize())}</h2>" + _means(by_name))
    if "sizes" in result:
        parts.append(_sizes(result))
    groups: dict[str, list[Clips]] = {}
    for clip in clips:
        groups.setdefault(clip[0], []).append(clip)
    for group, members in groups.items():
        parts.append(f"<h2>{html.escape(group.capitalize())}</h2>")
        if all(len(frames) == 1 for *_, frames in members):  # nothing to set beside each: all of them in rows
            figures = [
                _figure(f"{title} — {name}", video, fps, model)
                for _, title, one in members for name, video in one.items()
            ]
            parts.append(f'<div class="row">{"".join(figures)}</div>')
            continue
        for _, title, frames in members:
            figures = [_figure(name, video, fps, _origin(name, model)) for name, video in frames.items()]
            parts.append(f'<h3>{html.escape(title)}</h3><div class="row">{"".join(figures)}</div>')
    Path(path).write_text(document("sora eval", parts), encoding="utf-8")


def document(title: str, parts: Sequence[str]) -> str:
    """A page of its own, style and all."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _settings(result: Mapping[str, Any]) -> str:
    return (
        f"{result['prompts']} prompts, seed {result['seed']}, {result['steps']} steps, guidance "
        f"{result['guidance']:g}. VAE {result['vae']['psnr']} dB. Small figures are 95 % intervals over clips."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{first}</tr>{body}</table></div>'


def _share(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.0%}" + (f" <small>{interval[0]:.0%}–{interval[1]:.0%}</small>" if interval else "")


def _text(result: Mapping[str, Any]) -> str:
    rows = []
    for name, key, shares in (("clips", "score", result["score"]), ("of unseen pairs", "held_out", result["held_out"]),
                              *((name, name, shares) for name, shares in result["baselines"].items()),
                              ("true clips", "floor", result["floor"]),
                              ("true clips, coded", "vae", result["vae"])):  # fmt: skip
        rows.append([name, *(_share(shares[c], result["intervals"][key][c]) for c in CLAIMS)])
    told = "Share of the clips that show what their caption says, claim by claim."
    return f"<h2>Text</h2><p>{told}</p>" + table(["", *CLAIMS], rows)


def _cell(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{found['mean']:.3g} <small>{found['low']:.3g}–{found['high']:.3g}</small>"


def _measures(result: Mapping[str, Any]) -> str:
    told = f"True clips continued from their first {result['known']} frames, of every scene. Lengths in pixels of 64."
    return f"<h2>Continuation</h2><p>{told}</p>" + _means(result["continuation"])


def _means(by_name: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row for each measure, a column for each that was measured."""
    rows = [[html.escape(name), *map(_cell, cells)] for name, cells in rows_of(by_name)]
    return table(["", *by_name], rows)


def _horizons(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    lines = {
        name: [(h, found[f"position@{h:g}s"]["mean"]) for h in HORIZONS if f"position@{h:g}s" in found]
        for name, found in table.items()
    }
    return "<h3>Position error in pixels against seconds after the known frames</h3>" + chart(lines)


def _permanence(curves: Mapping[str, Mapping[str, Any]]) -> str:
    lines = {name: [((b["from"] + b["to"]) / 2, b["share"]) for b in curve["bins"]] for name, curve in curves.items()}
    lives = ", ".join(
        f"{html.escape(name)} {curve['half_life']:.2g} s" for name, curve in curves.items() if curve["half_life"]
    )
    number = max((sum(b["number"] for b in curve["bins"]) for curve in curves.values()), default=0)
    told = f"{number} times something was hidden. " + (f"Half-lives: {lives}." if lives else "")
    return f"<h3>Share that comes out again against the seconds it was hidden</h3><p>{told}</p>" + chart(lines, 1.0)


def _length(table: Mapping[str, Mapping[str, Sequence[float | None]]], means: Mapping[str, Any]) -> str:
    drawn = []
    for name, told in (("rigid", "IoU with its own shape"), ("counted", "Frames without other objects"),
                       ("there", "Frames with its objects"), ("motion", "Motion beside the true one")):  # fmt: skip
        lines = {
            who: [(2.0 * (i + 0.5), value) for i, value in enumerate(found[name]) if value is not None]
            for who, found in table.items()
        }
        drawn.append(f"<div><h3>{told}, against seconds</h3>{chart(lines, 1.0, width=500)}</div>")
    return f'<h2>Length</h2>{_means(means)}<div class="row">{"".join(drawn)}</div>'


def _sizes(result: Mapping[str, Any]) -> str:
    rows = []
    for size, found in {"its own": result, **result["sizes"]}.items():
        for name, key in (("", "score"), (", true clips", "floor"), (", true clips, coded", "vae")):
            shares = (_share(found[key][c], found["intervals"][key][c]) for c in CLAIMS)
            rows.append([size + name, *shares, _cell(found["shape"].get("rigidity") if key == "score" else None)])
    return "<h2>Size</h2>" + table(["", *CLAIMS, "rigidity"], rows)


def chart(lines: Mapping[str, Sequence[tuple[float, float]]], top: float = 0.0, width: int = 640) -> str:
    """An SVG of lines through (x, y), from 0 to `top` or the largest y."""
    height, left, right, bottom = 220, 40, 28, 26
    points = [p for line in lines.values() for p in line]
    if not points:
        return "<p>Nothing to show.</p>"
    most, last = max([top, *(y for _, y in points)]) or 1.0, max(x for x, _ in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / last * (width - left - right), (height - bottom) - y / most * (height - bottom - 14)

    drawn = []
    for k in range(5):
        _, y = place(0, most * k / 4)
        rule = f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".12"/>'
        drawn.append(f'{rule}<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most * k / 4:.2g}</text>')
        x, _ = place(last * k / 4, 0)
        drawn.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{last * k / 4:.3g}</text>')
    for k, line in enumerate(lines.values()):
        hue, path = _HUES[k % len(_HUES)], " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in line)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{hue}" stroke-width="2"/>')
        drawn += ['<circle cx="{:.1f}" cy="{:.1f}" r="2.6" fill="{}"/>'.format(*place(*p), hue) for p in line]
    legend = "".join(
        f'<span style="color:{_HUES[k % len(_HUES)]}">●</span> {html.escape(name)} &nbsp; '
        for k, name in enumerate(lines)
    )
    return f'<svg viewBox="0 0 {width} {height}" width="{width}">{"".join(drawn)}</svg><p>{legend}</p>'


def _origin(name: str, model: Origin) -> Origin:
    """That of a clip of the predictor `name`."""
    made = name.startswith("checkpoint") or name in ("from the words alone", "true clips, coded")
    return model if made else Origin({"by": name}, source="algorithmicMedia")


def _figure(caption: str, frames: np.ndarray, fps: float, origin: Origin) -> str:
    large = np.repeat(np.repeat(frames, 2, 1), 2, 2)
    data = base64.b64encode(media.video_bytes(large, fps, origin=origin)).decode()
    video = f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline></video>'
    return f"<figure>{video}<figcaption>{html.escape(caption)}</figcaption></figure>"
