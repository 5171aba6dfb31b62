"""Seeds and markers. Without a GPU, Triton kernels run in the interpreter, chosen before triton is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import sys
from collections.abc import Callable

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from sora_kernels import _dispatch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """This process reaches none but this machine: what would ask another fails as it does without a network."""

    def here(host) -> bool:
        return host in (None, "", "localhost", b"localhost") or str(host).startswith("127.") or host == "::1"

    def guarded(work, place):
        def ask(*arguments, **options):
            address = arguments[place]
            host = address[0] if isinstance(address, tuple) else None  # a path: a socket of this machine
            if not here(address if place == 0 else host):
                raise ConnectionError(f"the tests use no network, and something asks for {address!r}")
            return work(*arguments, **options)

        return ask

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("connect", "connect_ex"):
            monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), 1))
        monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, 0))
        yield


@pytest.fixture(autouse=True, scope="session")
def own_credentials(tmp_path_factory):
    """A signing key of this run's own, for its subprocesses too: never the user's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SORA_CREDENTIALS", str(tmp_path_factory.mktemp("credentials")))
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """The interpreter without two things that took half of its time and changed nothing: it patches `triton.language`
    at every call of a helper, and computes integer sums in 64 bits for assertions that only debugging makes."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, {}

    def patch_once(fn):
        module = fn.__globals__["__name__"]
        if module not in patched:
            patched[module] = patch(fn)
        return patched[module]

    def launch_anew(self, *args, **kwargs):
        patched.clear()  # at its end a launch takes its patches back
        return launch(self, *args, **kwargs)

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


# Begun first, or one of them would be left to one worker when all others are done.
LONGEST = ["test_compile_only.py", "test_ptx.py", "test_ptx_sm_90.py"]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    executed = config.pluginmanager.has_plugin("ptx.plugin")  # which runs what takes any device there is
    for item in items:
        if item.get_closest_marker("gpu") and not (executed and hasattr(item.module, "DEVICE")):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is present"))


@pytest.fixture
def require():
    """Skip, with the reason the library itself gives, where an implementation cannot run here."""

    def check(op: str, impl: str, device: str = "cpu", dtype: torch.dtype = torch.float32, grad: bool = False) -> None:
        if reason := _dispatch.why_not(op, impl, device, dtype, grad):
            pytest.skip(reason)

    return check


@pytest.fixture
def for_any_threads():
    """The tensors that `run()` gives by name, which must be the same bits however many threads run it."""

    def check(run: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run())
        finally:
            torch.set_num_threads(threads)
        for name, expected in results[0].items():
            assert all(torch.equal(other[name], expected) for other in results[1:]), name
        return results[0]

    return check


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A whole checkpoint of the project's own layout, tiny and untrained. Copy it before changing it."""
    from sora_model import recipe, train, world
    from sora_model.dit import DiTConfig
    from sora_model.pipeline import Sora
    from sora_model.text import WordTextConfig, WordTextEncoder

    torch.manual_seed(0)
    sizes = dict(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=128)
    dit = train.SoraDiT(DiTConfig(**sizes))
    torch.nn.init.normal_(dit.head.weight, std=0.3)
    vae = train.CausalVAE(train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1))
    vae.set_latent_statistics([0.1] * 4, [1.5] * 4)
    text = WordTextEncoder(WordTextConfig(words=world.VOCABULARY, dim=16))
    folder = tmp_path_factory.mktemp("own") / "checkpoint"
    Sora(dit, vae, text, recipe.load().defaults).save_pretrained(folder)
    return folder


@pytest.fixture
def sora(monkeypatch, tmp_path, capsys):
    """Runs the `sora` command in an empty folder: (exit code, stdout, stderr)."""
    from sora_model import cli, cli_clips, cli_safety, cli_world

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sora", *map(str, arguments)])
        # the consoles of the modules were bound to the streams of another test
        for name, stderr in (("out", False), ("err", True)):
            for module in (cli, cli_clips, cli_safety, cli_world):
                monkeypatch.setattr(module, name, cli.console(stderr=stderr, width=300))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run
