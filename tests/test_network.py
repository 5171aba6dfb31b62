"""The tests pass without a network, for they have none."""

from __future__ import annotations

import socket
import urllib.request

import pytest


def test_no_other_machine_can_be_asked():
    with socket.socket() as one, pytest.raises(ConnectionError, match="no network, .* asks for .'192.0.2.1', 80"):
        one.connect(("192.0.2.1", 80))
    with socket.socket() as one, pytest.raises(ConnectionError, match="no network"):
        one.connect_ex(("192.0.2.1", 80))
    with pytest.raises(OSError, match="no network, and something asks for 'example.org'"):
        urllib.request.urlopen("http://example.org", timeout=1)


def test_this_machine_can_be_asked(tmp_path):
    for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(tmp_path / "socket"))):
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(address)
            server.listen()
            client.connect(server.getsockname())
            with server.accept()[0] as served:
                served.sendall(b"here")
                assert client.recv(4) == b"here"
