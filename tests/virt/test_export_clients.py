# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is connected to an export: against real sockets of this host."""

import ast
import contextlib
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from vnb.qemu import iothreads
from vnb.virt import export_clients
from vnb.virt.export_clients import clients_of, read_lists

HOUR = 3600


@pytest.fixture(params=["unix", "unix a space", "ipv4", "ipv6"])
def server(request, tmp_path):
    """(listener, function that connects, Clients, whether it is TCP)"""
    if request.param.startswith("unix"):
        path = str(tmp_path / request.param.removeprefix("unix "))
        listener, is_tcp = socket.socket(socket.AF_UNIX), False
        listener.bind(path)
        watch = clients_of(path, False)
    else:
        family, host = {"ipv4": (socket.AF_INET, "127.0.0.1"), "ipv6": (socket.AF_INET6, "::1")}[request.param]
        listener, is_tcp = socket.socket(family), True
        try:
            listener.bind((host, 0))
        except OSError as error:
            pytest.skip(f"{host}: {error}")
        watch = clients_of(f"{host}:{listener.getsockname()[1]}", True)
    listener.listen(8)
    with listener, contextlib.ExitStack() as stack:
        def connect():
            client = stack.enter_context(socket.socket(listener.family))
            client.connect(listener.getsockname())
            return client

        yield listener, connect, watch, is_tcp


def test_they_are_counted_until_the_server_has_closed_them(server):
    listener, connect, watch, is_tcp = server
    assert watch.look(read_lists(is_tcp), 0) == 0
    assert not watch.in_handshake(0)
    client = connect()
    assert watch.look(read_lists(is_tcp), 1) == 1  # not accepted yet
    assert watch.in_handshake(HOUR)
    accepted, _ = listener.accept()
    with accepted:
        assert watch.look(read_lists(is_tcp), 2) == 1
        assert watch.in_handshake(2 + 10)
        assert not watch.in_handshake(2 + 11)
        connect()
        assert watch.look(read_lists(is_tcp), 20) == 2
        assert watch.in_handshake(HOUR)
        other, _ = listener.accept()
        other.close()
        client.close()
        assert watch.look(read_lists(is_tcp), 20) == 1  # the server does not know yet
        assert not watch.in_handshake(20)
    assert watch.look(read_lists(is_tcp), 20) == 0


def test_a_kernel_that_has_no_such_listener_cannot_tell(server):
    listener, _, watch, is_tcp = server
    lists = read_lists(is_tcp)
    listener.close()
    assert watch.look(read_lists(is_tcp), 0) is None
    assert watch.look(lists, 0) == 0
    assert watch.look(read_lists(is_tcp), 0) == 0  # the server has gone since
    assert watch.look(None, 0) is None


def test_another_network_namespace_cannot_tell(server, tmp_path):
    """As in a container: its lists have no socket of this one."""
    _, connect, watch, is_tcp = server
    connect()
    done = subprocess.run(
        ["unshare", "--net", "--", "cat", *export_clients.LISTS[is_tcp]], check=False, capture_output=True, text=True,
    )
    if done.returncode:
        pytest.skip(f"no network namespaces: {done.stderr}")
    assert watch.look(done.stdout, 0) is None


def test_what_is_being_accepted_is_waited_for(server, monkeypatch):
    listener, connect, watch, is_tcp = server
    monkeypatch.setattr(export_clients, "HANDSHAKE_SECONDS", HOUR)
    connect()
    looks = []

    def read():
        looks.append(len(looks))
        if len(looks) == 3:
            listener.accept()[0].close()
        return read_lists(is_tcp)

    watch.wait_for_handshakes(read, True)
    assert len(looks) == 3
    del looks[:]
    watch.wait_for_handshakes(read, False)
    assert len(looks) == 1
    del looks[:]
    watch.wait_for_handshakes(read, True)  # one may be coming
    assert len(looks) == 2


def test_forged_lines(server):
    """Anybody may give an abstract socket a name with line breaks."""
    _, _, watch, is_tcp = server
    assert watch.look(read_lists(is_tcp), 0) == 0
    path = next(iter(watch._paths), "")
    for line in (f"0: 0 0 z 0 0 0 {path}", f"0: 0 0 0 0 0 x {path}", f"0: {path}", "0: x", "  0: :ZZ :0 0A", "", ":"):
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(f"\0v\n{line}\nq")
            assert f"\n{line}\nq" in read_lists(False)
            assert watch.look(read_lists(False) + read_lists(True), 1) == 0


def test_a_kernel_without_ipv6(monkeypatch):
    monkeypatch.setitem(export_clients.LISTS, True, ("/proc/net/tcp", "/proc/net/no-tcp6"))
    assert "local_address" in read_lists(True)
    monkeypatch.setitem(export_clients.LISTS, True, ("/proc/net/tcp", "/proc/net"))
    assert read_lists(True) is None


@pytest.mark.parametrize("careful", [True, False])
def test_what_was_seen_in_its_handshake_is_waited_for_when_the_lists_are_gone(server, monkeypatch, careful):
    _, connect, watch, is_tcp = server
    monkeypatch.setattr(export_clients, "HANDSHAKE_SECONDS", 0.3)
    connect()
    lists = [read_lists(is_tcp), None]
    begin = time.monotonic()
    watch.wait_for_handshakes(lambda: lists.pop(0), careful)
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize("lists", [None, ""])
def test_where_nobody_can_tell_it_takes_as_long_as_a_handshake_may(monkeypatch, lists):
    monkeypatch.setattr(export_clients, "HANDSHAKE_SECONDS", 0.2)
    begin = time.monotonic()
    clients_of("/nowhere", False).wait_for_handshakes(lambda: lists, True)
    assert time.monotonic() - begin >= 0.2
    monkeypatch.setattr(export_clients, "HANDSHAKE_SECONDS", HOUR)
    clients_of("/nowhere", False).wait_for_handshakes(lambda: lists, False)


def test_one_that_never_ends_its_handshake_is_not_waited_for(server, monkeypatch):
    """QEMU has hung up on it by then; an old one does not."""
    _, connect, watch, is_tcp = server
    monkeypatch.setattr(export_clients, "HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr(export_clients, "MOST_SECONDS", 0.4)
    connect()
    waiting = threading.Thread(target=watch.wait_for_handshakes, args=[lambda: read_lists(is_tcp), True], daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.parametrize("module", [export_clients, iothreads])
def test_what_runs_on_another_host_knows_no_new_python(module):
    """There it is given to whatever python3 is: 3.6 in RHEL 8."""
    text = Path(module.__file__).read_text()
    ast.parse(text, feature_version=(3, 6))
    assert "from __future__ import annotations" not in text
