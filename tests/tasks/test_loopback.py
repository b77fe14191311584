"""Loopback goes through no proxy, for every reader of the variables."""

import socket
import threading
from urllib.request import build_opener, proxy_bypass_environment

import httpx
import pytest

from tasks.tracking.loopback import keep_loopback_direct


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, "x")  # so that it is restored
            monkeypatch.delenv(spelling)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "corp.example, 10.0.0.0/8"}, "corp.example,10.0.0.0/8,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a", "NO_PROXY": "b,localhost"}, "a,b,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_what_the_user_excepts_stays(given: dict, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name, value in given.items():
        monkeypatch.setenv(name, value)
    keep_loopback_direct()
    keep_loopback_direct()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected


def test_a_server_here_is_reached_beside_a_dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"

        def serve() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        # urlopen would keep the proxies of the first call in this process
        with pytest.raises(OSError):
            build_opener().open(url, timeout=5)
        keep_loopback_direct()
        with build_opener().open(url, timeout=5) as answer:
            assert answer.read() == b"ok"
        assert httpx.get(url, timeout=5).text == "ok"
    assert not proxy_bypass_environment("example.org")
