"""`sora policy`, `verify`, `detect`, `redteam` and `certs`: what may be asked for, where a file is from, who signs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .terminal import console, note, say

if TYPE_CHECKING:
    from .safety.credentials import Verdict

certs = typer.Typer(help="The key that files are signed with.", no_args_is_help=True)

out = console()
err = console(stderr=True)

_MARKS = 4  # in one clip, at most
_CODES = (0, 3, 4, 5)  # of `credentials.ANSWERS`; 1 is a mistake and 2 wrong usage


def judge(
    prompt: Annotated[str, typer.Argument(help="What somebody might ask for.")],
    rules: Annotated[
        Path | None, typer.Option(help="Policy file.", show_default="that of SORA_POLICY, or the shipped one")
    ] = None,
) -> None:
    """Say what the policy makes of PROMPT, by which rule: allow and review exit with 0, block with 3."""
    from .safety import policy

    decision = policy.decide(prompt) if rules is None else policy.Policy.load(rules).decide(prompt)
    if decision.category is None:
        return say(out, "allow")
    start, end = decision.span
    say(out, f"{decision.action}: class {decision.category}, rule {decision.rule}, characters {start} to {end} "
        f"{prompt[start:end]!r} as read {decision.reading}: {decision.message}")  # fmt: skip
    if decision.action == "block":
        raise typer.Exit(3)


def verify(
    file: Annotated[Path, typer.Argument(help="An MP4, MOV, AVI, PNG, JPEG or WebP.")],
    anchor: Annotated[
        Path | None, typer.Option(help="PEM of whom to trust.", show_default="this installation's own root")
    ] = None,
) -> None:
    """Say what FILE's content credentials are worth, and those of what it was made from.

    Exit code 0: trusted. 3: signed by an unknown party. 4: altered, the file or one that it was made from. 5: none.
    """
    from .safety import certificates, credentials

    anchors = None if anchor is None else certificates.read_anchors(anchor)
    verdict = credentials.verify(file, anchors=anchors)
    for line in _told(verdict, 0):
        say(out, line)
    answer = verdict.answer
    if answer != credentials.ALTERED:
        for one in verdict.altered_inputs():
            note(err, f"{one.name} had been altered after it was signed when this was made from it")
            answer = credentials.ALTERED
    raise typer.Exit(_CODES[credentials.ANSWERS.index(answer)])


def detect(
    file: Annotated[Path, typer.Argument(help="A video file, however it was encoded, scaled, cut or mirrored.")],
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint by which to look in the noise too, for clips of --shade.", show_default="none"),
    ] = None,
) -> None:
    """Look for this installation's mark in FILE's pixels, and for the record of what it was made by.

    Exit code 0: there is one. 5: none was found, which says nothing of where the clip comes from.
    """
    from .media import read_video
    from .safety import credentials, store, watermark

    found = watermark.detect(read_video(file))
    if not found.present and weights is not None:
        from .pipeline import Sora
        from .safety import shading

        noise = shading.detect(Sora.from_pretrained(weights), read_video(file))
        say(out, f"{file.name}: in the noise z {noise.z:.1f}, p {noise.p:.1g}")
        found = noise if noise.present else found
    if not found.present:
        needed = f"z {found.z:.1f}, where {watermark.THRESHOLD:g} is needed"
        say(out, f"{file.name}: no mark found ({needed}), which says nothing of where it comes from")
        raise typer.Exit(5)
    seen = f"at {found.scale:.3g} times the size" + (", mirrored" if found.mirrored else "")
    say(out, f"{file.name}: marked by this installation: z {found.z:.1f}, p {found.p:.1g}, {seen}")
    likely = found.likely(store.identities())
    made = credentials.youngest(file, likely) if len(likely) <= _MARKS else None
    if made is None:
        return say(out, "  as what cannot be told: its bits are those of no record here, or of more than one")
    identity, record, verdict = made
    say(out, f"  as {record.title}, {record.made}, identity {identity:08x}; its record, of the pixels as they were:")
    for line in _told(verdict, 1):
        say(out, line)


def redteam(
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="plain, writings, wording, temporal, languages, benign, bias, provenance or files; any number.",
            show_default="all",
        ),
    ] = None,
    to: Annotated[Path, typer.Option("--out", help="Folder of the page and of the log.")] = Path("out/redteam"),
) -> None:
    """Attack what is promised of prompts, records, marks and files, and count what gets through: a table and a page.

    Exit code 0: no more than the budget allows of any family. 3: more.
    """
    from .files import make_folder, naming, write_atomically
    from .safety import redteam as suite
    from .safety.redteam import runner

    cases = suite.cases(family or suite.BUDGET)
    make_folder(to)
    with write_atomically(to / "index.html") as part:
        found = runner.run(cases, to / "log")
        with naming(part):
            runner.page(found, part)
    table = Table("", "through", "share", "95 %", "at most")
    for name, groups in suite.table(found).items():
        through, count = map(sum, zip(*groups.values(), strict=True))
        low, high = suite.interval(through, count)
        table.add_row(
            name, f"{through} of {count}", f"{through / count:.1%}", f"{low:.1%} to {high:.1%}",
            f"{suite.BUDGET[name]:.0%}",
        )  # fmt: skip
    out.print(table)
    say(out, f"wrote {to / 'index.html'}; the log: inspect view --log-dir {to / 'log'}")
    for line in (over := suite.over_budget(found)):
        note(err, line)
    if over:
        raise typer.Exit(3)


def _told(verdict: Verdict, depth: int) -> Iterator[str]:
    by = f", by {verdict.signer}" if verdict.signer else ""
    why = f" ({', '.join(dict.fromkeys(verdict.reasons))})" if verdict.reasons else ""
    yield f"{'  ' * depth}{verdict.name}: {verdict.answer}{by}{why}"
    for action in verdict.actions:
        source = str(action.get("digitalSourceType", "")).rpartition("/")[2]
        facts = sorted((action.get("parameters") or {}).items())  # c2pa keeps no order
        facts = [(name, "; ".join(map(str, value)) if name == "loras" else value) for name, value in facts]
        told = ", ".join(f"{name} {value}" for name, value in facts if isinstance(value, str | int | float))
        yield "  " * (depth + 1) + " ".join(filter(None, (str(action.get("action")), source, told)))
    for one in verdict.inputs:
        yield from _told(one, depth + 1)


@certs.command("init")
def make_certificates(
    organisation: Annotated[str, typer.Option(help="In whose name to sign.")] = "sora local",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the one there is; what it signed stays trusted.")
    ] = False,
) -> None:
    """Make a key and a chain of two certificates, which the first file to be written does otherwise."""
    from .safety import certificates

    path = certificates.init(force=force, organisation=organisation)
    say(out, f"wrote {path}: signs as {certificates.load(path).name}")


@certs.command("root")
def show_root() -> None:
    """Print the root certificate: what others verify this installation's files with, by --anchor."""
    from .safety import certificates

    if not (root := certificates.current().anchors):
        raise certificates.CredentialsError(
            "the identity holds no root certificate: that of whoever issued its certificates is what others need"
        )
    out.print(root, end="", soft_wrap=True)
