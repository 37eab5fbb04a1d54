# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sources, as far as they need no machine."""

import os
import subprocess
from types import SimpleNamespace

import pytest
from job_records import record

from vnb.base.errors import Error
from vnb.base.ssh import Host
from vnb.job import source_running, source_stopped
from vnb.job.source import Wanted
from vnb.job.source_running import PORT_TRIES, Running
from vnb.job.source_vanished import Gone
from vnb.nbd.endpoint import Tcp, Unix
from vnb.virt import domxml, export_clients
from vnb.virt.failures import AddressInUse


class Domain:
    """Refuses to begin a backup this often, with such an error."""

    name = uuid = "vm"
    uri = "qemu:///system"

    def __init__(self, refusals, kind=AddressInUse):
        self.refusals = refusals
        self.kind = kind
        self.begun = []

    def begin_backup(self, backup, _checkpoint, _reuse):
        if self.refusals:
            self.refusals -= 1
            raise self.kind("vm", "why")
        self.begun.append(domxml.backup_endpoint(backup))


def begin(domain, endpoint):
    """What _begin() wrote into the record of the job, in order."""
    written = []
    wanted = Wanted("p", None, "", None, [], [], endpoint, "/run/job")
    journal = SimpleNamespace(record=record(), intend=lambda **changes: written.extend(changes.items()))
    Running(domain)._begin(wanted, journal)
    return written


def test_a_port_that_is_taken_is_not_tried_again():
    domain = Domain(3)
    endpoint = Tcp("127.0.0.1", None, "localhost")
    written = begin(domain, endpoint)
    assert domain.begun == [endpoint.key]
    # Whoever has to end the job finds where it listens, before it does.
    assert len(written) == 3
    assert written[-1] == ("endpoint", endpoint.key)


@pytest.mark.parametrize(("domain", "endpoint"), [
    (Domain(PORT_TRIES), Tcp("127.0.0.1", None, "localhost")),
    (Domain(1), Tcp("127.0.0.1", 10809, "localhost")),  # the user's own
    (Domain(1), Unix("/run/x")),
    (Domain(1, Error), Tcp("192.0.2.1", None, "localhost")),
])
def test_what_is_not_tried_again(domain, endpoint):
    with pytest.raises(Error):
        begin(domain, endpoint)
    assert domain.begun == []


@pytest.mark.parametrize(("version", "why"), [
    (7_002_022, "(7.2.22) would abort"), (8_002_003, None), (10_000_002, None),
])
@pytest.mark.parametrize("uri", ["qemu:///system", "qemu+ssh://far/system"])
def test_an_iothread_whose_qemu_cannot_be_tried(monkeypatch, version, why, uri):
    """Its version has to do; it is looked at once for all disks."""
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise Error("far", "no way") if "far" in uri else PermissionError

    monkeypatch.setattr(source_running.iothreads, "find_out", refuse)
    monkeypatch.setattr(Host, "run", lambda _self, *_: refuse())
    domain = Domain(0)
    domain.xml = lambda: "<domain/>"
    domain.call_connection = lambda _name: version
    running = Running(domain, Host.of_uri(uri))
    for _ in range(2):
        found = running._iothread_because(SimpleNamespace(on_iothread=True))
        assert found is None if why is None else why in found
    assert running._iothread_because(SimpleNamespace(on_iothread=False)) is None
    assert len(asked) == 1


FAR = pytest.mark.parametrize(("uri", "is_tcp", "has_worked", "asks"), [
    ("qemu+ssh://far/system", False, False, True),
    ("qemu+ssh://far/system", True, False, True),
    ("qemu+tls://far/system", False, False, True),  # its socket comes by ssh
    ("qemu+tls://far/system", True, False, False),
    ("qemu+tls://far/system", True, True, True),
])


def shut_out_there(monkeypatch, uri, is_tcp, has_worked, is_committing, run):
    """Have the clients of an export on another host shut out: (seconds that were slept, lines that were said)."""
    slept, said = [], []
    monkeypatch.setattr(export_clients, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=slept.append))
    host = Host.of_uri(uri)
    monkeypatch.setattr(host, "run", run)
    made = record(endpoint="127.0.0.2:49152" if is_tcp else "/run/a socket", tcp=is_tcp, scratch_made=has_worked)
    Running(Domain(0), host)._shut_out(SimpleNamespace(record=made, note=said.append), None, careful=not is_committing)
    return slept, said


@FAR
@pytest.mark.parametrize("is_committing", [True, False])
def test_another_host_that_cannot_be_asked_who_is_connected(monkeypatch, uri, is_tcp, has_worked, asks, is_committing):
    """Its failure is said, and what is no commit waits blindly then."""
    def run(what, *_):
        raise Error(what, "no way")

    slept, said = shut_out_there(monkeypatch, uri, is_tcp, has_worked, is_committing, run)
    assert slept == ([] if is_committing else [export_clients.HANDSHAKE_SECONDS])
    assert said == ["far: no way: not known who is connected to the export there"] * asks


@FAR
def test_another_host_cuts_its_connections(monkeypatch, uri, is_tcp, has_worked, asks):
    """Where ssh is needed anyway, or has worked: by a Python there that has nothing of ours."""
    ran = []

    def run(_what, python, *arguments):
        environment = {"PATH": os.environ["PATH"]}
        ran.append(subprocess.run(
            [python, "-I", *arguments], env=environment, capture_output=True, check=True, text=True, cwd="/"
        ).stdout)
        return ran[-1]

    slept, said = shut_out_there(monkeypatch, uri, is_tcp, has_worked, True, run)
    assert (slept, said) == ([], [])
    assert ran == ["0\n"] * asks


def test_a_client_that_cannot_be_cut_off_keeps_the_job(monkeypatch):
    """To end it would stop the guest, which is worth more."""
    with pytest.raises(Error, match=r"do not read \(2\), and this user may not cut them off"):
        shut_out_there(monkeypatch, "qemu+ssh://far/system", False, True, False, lambda *_: b"2\n")


def test_a_socket_that_cannot_be_removed():
    """As on a file system that has become read-only: the job is over all the same."""
    made = record(sockets=["/proc/self/status"], tcp=True, endpoint="x:1")
    Gone(None).end(SimpleNamespace(record=made), None, careful=True)


@pytest.mark.parametrize(("named", "same"), [("/data", True), ("/../data", True), ("/other", False)])
def test_another_data_file_in_the_xml_is_another_image(named, same):
    """qemu-nbd takes the header's, QEMU the one in the XML; libvirt 9.0 knows no such element, so no machine has it."""
    disk, = domxml.disks(
        f"""<domain><devices><disk type='file'><driver type='qcow2'/><source file='/top'>
        <dataStore type='file'><format type='raw'/><source file='{named}'/></dataStore></source>
        <target dev='vda'/></disk></devices></domain>"""
    )
    layer = SimpleNamespace(path="/top", format="qcow2", data_file="/data")
    assert source_stopped._is_chain_of(disk, [layer]) == same
