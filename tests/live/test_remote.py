# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines of another host: libvirt through ssh, exports through a forwarded socket, over TCP, with TLS."""

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import time

import pytest
from backups import in_handshake, levels, record, restores
from lab import ROOT, Disk, MiB, compare, wait_for
from remote import SSHD, Gate, Hypervisor, Network

from vnb.store.backupset import segments

URI = "qemu+ssh://root@hv/system"
STORE = "vnb-extents | vnb-read | vnb-pack -z -o {set}"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="logs in as root"),
    pytest.mark.skipif(SSHD is None, reason="no sshd here"),
]


@pytest.fixture
def hv(lab):
    hypervisor = Hypervisor(lab)
    try:
        yield hypervisor
    finally:
        hypervisor.close()


@pytest.fixture
def network(lab):
    try:
        network = Network()
    except RuntimeError as error:
        pytest.skip(f"no network namespaces: {error}")
    try:
        yield network
    finally:
        network.close()


@pytest.fixture
def far(lab, network):
    """A hypervisor at the other end of a line."""
    hypervisor = Hypervisor(lab, network.address, network.there)
    try:
        yield hypervisor
    finally:
        hypervisor.close()


def backup(hv, vm, level, directory, options="", check=True):
    store = STORE.format(set=f'"{directory}"')
    return hv.sh(
        f"vnb-checkpoint run -c {URI} --no-freeze {vm.name} --level {level} --set '{directory}' {options}"
        f" -- '{store}'", check=check,
    )


def test_a_chain_through_ssh(lab, hv, vm):
    """Full and increments; QEMU opens no port: its socket is forwarded. A set's name may have a space."""
    directory = lab.path("far set", vm.name)
    references = []
    for number in range(3):
        vm.write_random("vda", (10 + number) * MiB, MiB, seed=number)
        vm.zero("vda", MiB, MiB)
        references.append(vm.reference())
        backup(hv, vm, "auto", directory)
    assert levels(directory) == ["full", "inc", "inc"]
    restores(lab, f'"{directory}"', references[-1])
    middle = sorted(os.listdir(directory))[1].removesuffix(".inc.vnb")
    restores(lab, f'"{directory}"', references[1], point=middle)
    roles = hv.sh(f"vnb-cat --head '{directory}' | vnb-dump").stdout.decode()
    assert "image-info" in roles
    wait_for(lambda: not hv.sessions(), "end of all ssh")


def test_begin_and_commit(lab, hv, vm):
    directory = lab.new_directory("set")
    begin = f"vnb-checkpoint begin -c {URI} --no-freeze {vm.name} --level full --set {directory}"
    hv.sh(f"{begin} | {STORE.format(set=directory)}")
    assert vm.has_job()
    job = lab.path("state", "jobs", vm.uuid)
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in (job, f"{job}/nbd.sock")] == [0o700, 0o600]
    hv.sh(f"vnb-checkpoint commit -c {URI} {vm.name}")
    assert not vm.has_job()
    wait_for(lambda: not hv.sessions(), "end of all ssh")
    restores(lab, directory, vm.reference())


def test_a_machine_that_is_off(lab, hv, vm):
    """Its images are there, so it is started, paused, for the backup; and this is what one is told who does not say."""
    directory = lab.new_directory("set")
    reference = vm.reference()
    vm.handle.destroy()
    done = backup(hv, vm, "full", directory, check=False)
    assert done.returncode == 1
    assert "--start-paused" in done.stderr
    backup(hv, vm, "full", directory, "--start-paused")
    assert not vm.handle.isActive()
    restores(lab, directory, reference)
    vm.start()


def test_files_of_the_other_host(lab, hv):
    """Kernel and nvram come through ssh, from paths with spaces."""
    kernel = lab.path("a kernel")
    with open(kernel, "wb") as file:
        file.write(b"k" * (2 * MiB + 5))
    os.chmod(kernel, 0o640)
    vm = lab.domain(Disk("vda", 8 * MiB), start=False)
    try:
        xml = vm.handle.XMLDesc().replace("</os>", f"<kernel>{kernel}</kernel></os>")
        lab.connection.defineXML(xml)
        vm.start()
        directory = lab.new_directory("set")
        backup(hv, vm, "copy", directory)
        target = lab.new_directory("files")
        hv.sh(f"vnb-cat --head {directory} | vnb-config --disk-dir {target} -o {target}/x.xml")
        ((described,),) = [saved.head["files"] for saved in segments([directory])]
        assert described["sha256"] == hashlib.sha256(b"k" * (2 * MiB + 5)).hexdigest()
        restored = [name for name in os.listdir(target) if "kernel" in name]
        assert restored
        with open(f"{target}/{restored[0]}", "rb") as file:
            assert file.read() == b"k" * (2 * MiB + 5)
    finally:
        vm.remove()


def test_the_line_is_cut(lab, hv, vm):
    """Nothing is committed, no part is in the set, the job has ended, and the next backup is right."""
    directory = lab.new_directory("set")
    backup(hv, vm, "full", directory)
    vm.write_random("vda", 20 * MiB, 4 * MiB, seed=9)
    gate = Gate(f"{directory}.gate")
    process = gate.start(
        f"vnb-checkpoint run -c {URI} --no-freeze {vm.name} --level inc --set {directory} --"
        f" 'vnb-extents | vnb-read --request-size 4096 --requests 1 | {gate.filter} | vnb-pack -o {directory}'",
        {**lab.env, **hv.env})  # a few large requests would be all of it, before the line is cut
    hv.cut()
    gate.open()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert levels(directory) == ["full"]
    assert not vm.has_job()
    assert len(vm.checkpoints()) == 1
    reference = vm.reference()
    backup(hv, vm, "inc", directory)
    restores(lab, directory, reference)


def test_the_line_is_down(lab, far, network, vm):
    """
    For longer than anybody waits: the pipeline fails, and the job is ended when the line is there again.

    Here its two ends are network namespaces, and the stages run at the other one than sshd.
    """
    directory = lab.new_directory("set")
    here = " ".join(network.here)
    begin = f"vnb-checkpoint run -c {URI} --no-freeze {vm.name} --set {directory} --level"
    far.sh(f"{here} {begin} full -- '{STORE.format(set=directory)}'")
    vm.write_random("vda", 20 * MiB, 4 * MiB, seed=9)
    gate = Gate(f"{directory}.gate")
    process = gate.start(
        f"{here} {begin} inc -- 'vnb-extents | vnb-read --request-size 4096 --requests 1 | {gate.filter} |"
        f" vnb-pack -o {directory}; touch {directory}.ended; exit 1'", {**lab.env, **far.env})
    network.down()
    gate.open()
    wait_for(lambda: os.path.exists(f"{directory}.ended"), "the end of the pipeline", 90)
    assert vm.has_job()
    network.up()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "vnb-read: vda" in said, said
    assert levels(directory) == ["full"]
    assert not vm.has_job()
    assert len(vm.checkpoints()) == 1
    reference = vm.reference()
    far.sh(f"{here} {begin} inc -- '{STORE.format(set=directory)}'")
    restores(lab, directory, reference)


@pytest.mark.parametrize("listen", ["", "--nbd-listen 127.0.0.1"], ids=["unix", "tcp"])
def test_a_client_in_its_handshake(lab, hv, vm, listen):
    """The other host's kernel is asked who is still in it: QEMU 7.2 would wait for them, and the guest stand still."""
    directory = lab.new_directory("set")
    hv.sh(f"vnb-checkpoint begin -c {URI} --no-freeze {vm.name} --level full --set {directory} {listen}"
          f" > {directory}.begun")
    with in_handshake(record(lab, vm)) as client:
        hv.sh(f"vnb-checkpoint abort -c {URI} {vm.name}")
        assert client.recv(1) == b""
    assert not vm.has_job()
    backup(hv, vm, "full", directory)
    restores(lab, directory, vm.reference())


def test_libvirtd_is_restarted(lab, hv, vm):
    """Between begin and commit: the job survives that, and the keeper's connection is made again."""
    directory = lab.new_directory("set")
    reference = vm.reference()
    hv.sh(f"vnb-checkpoint begin -c {URI} --no-freeze {vm.name} --level full --set {directory} | vnb-extents |"
          f" vnb-read > {directory}.data")
    lab.restart_libvirtd()
    hv.sh(f"vnb-pack -o {directory} < {directory}.data && vnb-checkpoint commit -c {URI} {vm.name}")
    assert not vm.has_job()
    restores(lab, directory, reference)
    reference = vm.reference()
    backup(hv, vm, "inc", directory)
    restores(lab, directory, reference)


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_over_tcp(lab, hv, vm, address):
    """A port that is chosen; IPv6 too. Here and through ssh."""
    directory = lab.new_directory("set")
    backup(hv, vm, "full", directory, f"--nbd-listen {address}")
    vm.write_random("vda", 20 * MiB, MiB, seed=4)
    reference = vm.reference()
    lab.sh(f"vnb-checkpoint run --no-freeze {vm.name} --level inc --set {directory} --nbd-listen {address}"
           f" -- '{STORE.format(set=directory)}'")
    restores(lab, directory, reference)


# TLS


def make_ca(directory, *names, **environment):
    subprocess.run([ROOT / "examples" / "test-ca", directory, *names], check=True, env={**os.environ, **environment})


@pytest.fixture
def pki(lab):
    """make(*names, days=2): certificates for QEMU, and the directory of those for its clients."""
    place = "/etc/libvirt/pki"

    def make(*names, days=2):
        authority = lab.new_directory("ca")
        for valid in (2, days):  # the authority itself is made once
            make_ca(authority, *names, DAYS=str(valid))
        for name in os.listdir(f"{authority}/server"):
            shutil.copyfile(f"{authority}/server/{name}", f"{place}/{name}")
            os.chmod(f"{place}/{name}", 0o644)
        return f"{authority}/client"

    yield make
    for name in os.listdir(place):
        os.unlink(f"{place}/{name}")


def over_tls(lab, vm, level, directory, certificates, listen="localhost", check=True):
    return lab.sh(
        f"vnb-checkpoint run --no-freeze {vm.name} --level {level} --set {directory} --nbd-listen {listen} --tls"
        f" --tls-certificates {certificates} -- '{STORE.format(set=directory)}'", check=check,
    )


def test_tls(lab, vm, pki):
    client = pki("localhost")
    directory = lab.new_directory("set")
    over_tls(lab, vm, "full", directory, client)
    vm.write_random("vda", 20 * MiB, MiB, seed=4)
    reference = vm.reference()
    over_tls(lab, vm, "inc", directory, client)
    restores(lab, directory, reference)


@pytest.mark.parametrize(("what", "said"), [
    ("another authority", "the server's certificate is refused: unable to get local issuer certificate"),
    ("expired", "has expired"),
    ("another name", "the server's certificate is refused: IP address mismatch"),
    ("an unknown client", "the server ended the connection: it may not take our certificate"),
    ("no certificates", "ca-cert.pem, client-cert.pem and client-key.pem are needed: No such file"),
])
def test_tls_that_is_not_right(lab, vm, pki, what, said):
    """One clear line, no plain connection instead, and nothing is left."""
    client = pki("localhost", days=0 if what == "expired" else 2)
    made = time.time()
    if what == "expired":
        wait_for(lambda: time.time() > made + 2, "the second after the one in which it was made")
    if what == "another authority":
        client = lab.new_directory("other")
        make_ca(client, "localhost")
        client += "/client"
    elif what == "no certificates":
        client = lab.path("nowhere")
    elif what == "an unknown client":
        other = lab.new_directory("other")
        make_ca(other, "localhost")
        for name in ("client-cert.pem", "client-key.pem"):
            shutil.copy(f"{other}/client/{name}", f"{client}/{name}")
    listen = "127.0.0.1" if what == "another name" else "localhost"
    directory = lab.new_directory("set")
    done = over_tls(lab, vm, "full", directory, client, listen, check=False)
    assert done.returncode == 1
    assert said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(directory) == []
    assert not vm.has_job()
    assert vm.checkpoints() == []


def test_no_tls_at_the_other_end(lab, vm, pki):
    client = pki("localhost")
    begin = f"vnb-checkpoint begin --no-freeze {vm.name} --level copy --nbd-listen 127.0.0.1"
    uri = lab.sh(f"{begin} | vnb-dump --json | grep -o 'nbd://[^\"]*/vda-[0-9a-f]*'").stdout.decode().strip()
    assert uri.startswith("nbd://127.0.0.1:")
    done = lab.sh(f"vnb-extents '{uri.replace('nbd:', 'nbds:')}?tls-certificates={client}' > /dev/null", check=False)
    assert done.returncode == 1
    assert done.stderr == "vnb-extents: disk: cannot connect: the server has no TLS\n"
    lab.sh(f"vnb-checkpoint abort {vm.name}")


def test_filters_that_take_a_uri(lab, vm, pki):
    """nbds to read from and to restore to."""
    client = pki("localhost", "127.0.0.1")
    server = "/etc/libvirt/pki"
    reference = vm.reference()
    copy = lab.path(f"{vm.name}.copy")
    with open(copy, "wb") as file:
        file.truncate(64 * MiB)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    uri = f"nbds://127.0.0.1:{port}/?tls-certificates={client}"
    serve = f"nbdkit -f --tls=require --tls-certificates={server} --tls-verify-peer -i 127.0.0.1 -p {port}"
    lab.sh(f"""
        {serve} --run 'vnb-extents "{uri}" | vnb-read | vnb-pack > {copy}.vnb' file {reference["vda"]}
        {serve} --run 'vnb-apply --disk disk="{uri}" < {copy}.vnb' file {copy}
    """)
    compare(reference["vda"], copy, "raw")


def test_a_port_that_is_taken(lab, hv, vm):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = backup(hv, vm, "full", lab.new_directory("set"), f"--nbd-listen 127.0.0.1:{port}", check=False)
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert not vm.has_job()
    assert vm.checkpoints() == []


def test_the_scripts(lab, hv, vm):
    """vnb-backup with a URI, and with TLS options that contradict."""
    directory = lab.new_directory("set")
    reference = vm.reference()
    hv.sh(f"vnb-backup -c {URI} --ssh-user root --no-freeze --nbd-listen 127.0.0.1 {vm.name} {directory}")
    restores(lab, directory, reference)
    done = hv.sh(f"vnb-backup -c {URI} --tls {vm.name} {directory}", check=False)
    assert done.returncode == 2
    assert "--tls: is for --nbd-listen" in done.stderr


def test_an_ssh_that_does_not_come_in(lab, hv, vm):
    """One line, and nothing is begun."""
    directory = lab.new_directory("set")
    uri = URI.replace("root@hv", "hv")
    done = hv.sh(f"vnb-checkpoint run -c '{uri}' --ssh-key {hv.path('none')} --ssh-user nobody --no-freeze {vm.name}"
                 f" --level full --set {directory} -- '{STORE.format(set=directory)}'", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "ermission denied" in done.stderr
    assert vm.checkpoints() == []
    assert not vm.has_job()


# The pipeline over ssh: stages there, stages here


def test_both_forms_over_ssh(lab, far, network, vm):
    """The storing stage under run, from there; and begin there, pack here, commit there, the parent named here."""
    reference = vm.reference()
    directory = lab.new_directory("set")
    here = " ".join(network.here)
    # Here is the hypervisor, and the set is there.
    lab.sh(f"vnb-checkpoint run --no-freeze {vm.name} --level full --set {directory} -- 'vnb-extents | vnb-read |"
           f" vnb-pack -z | {here} ssh hv vnb-pack -o {directory}'", env=far.env)
    restores(lab, directory, reference)
    # There is the hypervisor, and the set is here; whose ledger is not known there.
    vm.write_random("vda", 20 * MiB, MiB, seed=4)
    reference = vm.reference()
    begin = f"vnb-checkpoint begin --no-freeze {vm.name} --level inc --base $(vnb-cat --base {directory})"
    far.sh(f"{here} ssh hv \"{begin} | vnb-extents | vnb-read | vnb-pack -z\" | vnb-pack -o {directory} &&"
           f" {here} ssh hv vnb-checkpoint commit {vm.name}")
    assert levels(directory) == ["full", "inc"]
    restores(lab, directory, reference)


def test_ssh_drops_between_the_stages(lab, far, network, vm):
    """The set has no part of it, nothing is committed, and the next increment is right."""
    directory = lab.new_directory("set")
    here = " ".join(network.here)
    lab.sh(f"vnb-checkpoint run --no-freeze {vm.name} --level full --set {directory} --"
           f" '{STORE.format(set=directory)}'")
    vm.write_random("vda", 20 * MiB, 4 * MiB, seed=9)
    gate = Gate(f"{directory}.gate")
    process = gate.start(
        f"vnb-checkpoint run --no-freeze {vm.name} --level inc --set {directory} --"
        f" 'vnb-extents | vnb-read | {gate.filter} | {here} ssh hv vnb-pack -o {directory}'", {**lab.env, **far.env})
    far.cut()
    gate.open()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert not vm.has_job()
    assert len(vm.checkpoints()) == 1
    reference = vm.reference()
    lab.sh(f"vnb-checkpoint run --no-freeze {vm.name} --level inc --set {directory} --"
           f" '{STORE.format(set=directory)}'")
    assert levels(directory) == ["full", "inc"]
    assert not [name for name in os.listdir(directory) if name.startswith(".")]
    restores(lab, directory, reference)


def test_a_standby_over_a_bad_line(lab, far, network, vm):
    """Cut in the middle of an increment it is at the point before; the same increment again brings it up."""
    directory, standby = lab.new_directory("set"), lab.path(f"{vm.name}.standby")
    here = " ".join(network.here)
    backup_here = f"vnb-checkpoint run --no-freeze {vm.name} --set {directory} --level"
    references = [vm.reference()]
    lab.sh(f"{backup_here} full -- '{STORE.format(set=directory)}'")
    send = f"{here} ssh hv vnb-apply --update {standby}"
    far.sh(f"vnb-cat {directory} | {send}")
    vm.write_random("vda", 20 * MiB, 4 * MiB, seed=9)
    references.append(vm.reference())
    lab.sh(f"{backup_here} inc -- '{STORE.format(set=directory)}'")
    increment = sorted(os.listdir(directory))[-1]
    gate = Gate(f"{directory}.gate")
    process = gate.start(f"{gate.filter} < {directory}/{increment} | {send}", {**lab.env, **far.env})
    far.cut()
    gate.open()
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: not [name for name in os.listdir(standby) if name.endswith(".partial")], "end of vnb-apply there")
    for disk, image in references[0].items():
        compare(image, f"{standby}/{disk}.qcow2", "qcow2")
    far.sh(f"{send} < {directory}/{increment}")
    for disk, image in references[1].items():
        compare(image, f"{standby}/{disk}.qcow2", "qcow2")
