# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where QEMU listens, and how ssh gets to its host: text in, text out."""

import pytest

from vnb.base.errors import Error, UsageError
from vnb.base.ssh import Host
from vnb.nbd.endpoint import Tcp, Unix, parse_listen
from vnb.virt import domxml


@pytest.mark.parametrize(("text", "expected"), [
    ("127.0.0.1", ("127.0.0.1", None)),
    ("127.0.0.1:10809", ("127.0.0.1", 10809)),
    ("hv.example:1", ("hv.example", 1)),
    ("[::1]:10809", ("::1", 10809)),
    ("[fe80::1]", ("fe80::1", None)),
    ("::1", ("::1", None)),
    ("::", ("::", None)),
    (":10809", ("", 10809)),
    ("0.0.0.0", ("0.0.0.0", None)),  # noqa: S104
])
def test_listen(text, expected):
    assert parse_listen(text) == expected


@pytest.mark.parametrize("text", [
    "", "a b", "host:0", "host:65536", "host:x", "[::1", "[::1]10809", "[x]:1", "a/b", "h:1:2x",
])
def test_no_listen(text):
    with pytest.raises(UsageError):
        parse_listen(text)


def test_uris():
    assert Unix("/a b/x&y").uri("sd?a") == "nbd+unix:///sd%3Fa?socket=/a%20b/x%26y"
    assert Tcp("::1", 5, "hv").uri("vda") == "nbd://[::1]:5/vda"
    assert Tcp("0.0.0.0", 5, "hv").uri("vda") == "nbd://hv:5/vda"  # noqa: S104
    assert Tcp("", 5, "hv", tls=True, certificates="/p q").uri("vda") == "nbds://hv:5/vda?tls-certificates=/p%20q"
    assert Tcp("hv", 5, "x", tls=True).uri("vda") == "nbds://hv:5/vda"


def test_a_port_is_chosen_anew():
    endpoint = Tcp("127.0.0.1", None, "localhost")
    seen = {endpoint.key}
    for _ in range(8):
        endpoint.choose_port()
        assert endpoint.attributes() == {"transport": "tcp", "name": "127.0.0.1", "port": str(endpoint.port)}
        seen.add(endpoint.key)
    assert len(seen) > 1


def options(uri, **given):
    argv = Host.of_uri(uri, **given).argv("true")
    assert argv[0] == "ssh"
    assert argv[-3] == "--"
    return argv[-2], [word for word in argv[1:-3] if not word.startswith("-o") or "Known" in word or "Strict" in word]


def test_hosts():
    assert Host.of_uri("qemu:///system") is None
    assert Host.of_uri("qemu:///session?socket=/x") is None
    assert Host.of_uri("qemu+unix:///system") is None
    assert options("qemu+ssh://root@hv/system") == ("hv", ["-lroot"])
    assert options("qemu+ssh://me@hv:2222/system?keyfile=/k") == ("hv", ["-p2222", "-i/k", "-lme"])
    assert options("qemu+ssh://me@hv/system", user="u", port="7", key="/x") == ("hv", ["-p7", "-i/x", "-lu"])
    # The port and the user of another protocol are not ssh's.
    assert options("qemu+tls://me@hv:16514/system") == ("hv", [])
    assert options("qemu+ssh://hv/system?no_verify=1") == ("hv", ["-oStrictHostKeyChecking=no"])


@pytest.mark.parametrize("uri", ["qemu+ssh://-oProxyCommand=x/system", "qemu+ssh://:22/system"])
def test_no_hosts(uri):
    with pytest.raises(Error):
        Host.of_uri(uri)


@pytest.mark.parametrize("text", [
    ":10809", ":", "0.0.0.0", "0.0.0.0:1", "[::]:1", "::", "[::1]:1", "localhost:1", "a.b",  # noqa: S104
])
def test_a_job_is_known_by_where_it_listens(text):
    """Else it would be taken for somebody else's, and go on without end."""
    tcp = Tcp(*parse_listen(text), "host")
    assert domxml.backup_endpoint(domxml.backup(tcp.attributes(), [], [])) == tcp.key
