# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections of a server that waits until it can write, as QEMU does, are cut: by root, and by who owns one end."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
# The test itself, as a program, since other users are to run it. Its server does as QEMU: it fills a connection, waits
# until it can write, whatever else the kernel says of it, and closes it when a write fails.
PROGRAM = """
import errno, os, select, socket, sys
sys.path.insert(0, os.environ["VNB_TEST_ROOT"])
from vnb.virt.export_clients import clients_of

def serve(listener, told):
    connection, _ = listener.accept()
    connection.setblocking(False)
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    try:
        while True:
            try:
                connection.send(b"x" * 50000)
            except BlockingIOError:
                os.write(told, b"full ")
                while not poll.poll()[0][1] & (select.POLLOUT | select.POLLERR):
                    pass
    except OSError as error:
        os.write(told, errno.errorcode[error.errno].encode())
    connection.close()

def connect():
    client = socket.socket(listener.family)
    client.settimeout(30)
    client.connect(place)
    return client

kind, path, user = sys.argv[1:]
if kind == "unix":
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    endpoint = place = path
    os.chmod(path, 0o777)
else:
    listener = socket.socket(socket.AF_INET6 if ":" in kind else socket.AF_INET)
    listener.bind((kind, 0))
    place = listener.getsockname()[:2]
    endpoint = "%s:%d" % (kind, place[1])
listener.listen()
hear, told = os.pipe()
end, ours = os.pipe()
if os.fork() == 0:
    os.close(ours)
    serve(listener, told)
    os.read(end, 1)  # until we end
    os._exit(0)
listener.close()
os.close(told)
if user:
    os.setresuid(int(user), int(user), int(user))
client = connect()
print(os.read(hear, 100).decode())
print("stalled", clients_of(endpoint, kind != "unix").shut_out())
print(os.read(hear, 100).decode())
try:
    while part := client.recv(1 << 20):
        assert part == b"x" * len(part)
except OSError as error:
    assert error.errno in (errno.ENOTCONN, errno.ECONNRESET), error
try:
    connect()
    print("connected")
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("kind", ["unix", "127.0.0.1", "0.0.0.0", "localhost", "::1", "::"])  # noqa: S104
@pytest.mark.parametrize("who", ["us", "the user of both", "the user of the client"])
def test_a_client_that_does_not_read_is_cut_off(kind, who):
    if who != "us" and os.geteuid() != 0:
        pytest.skip("it takes root to be another user")
    others = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "--"] if who == "the user of both" else []
    user = str(NOBODY) if who == "the user of the client" else ""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o777)  # noqa: S103 -- and so are those above it
        done = subprocess.run(
            [*others, sys.executable, "-c", PROGRAM, kind, f"{directory}/a socket", user],
            env={**os.environ, "VNB_TEST_ROOT": str(ROOT)}, capture_output=True, text=True, check=False, timeout=60,
        )
    if kind.startswith("::") and "Cannot assign" in done.stderr:
        pytest.skip("no IPv6 here")
    assert done.stderr == ""
    full, stalled, error, another = done.stdout.splitlines()
    assert (full, stalled) == ("full ", "stalled 0")
    assert error in ("EPIPE", "ECONNRESET")
    # A port is closed by whoever may do that to its process.
    assert another == ("ENOENT" if kind == "unix" else "connected" if user else "ECONNREFUSED")
