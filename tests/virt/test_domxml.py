# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domain and checkpoint XML: what is read from it, and what is never let in."""

import pytest

from vnb.base.errors import Error
from vnb.virt import domxml, file_elements

DOMAIN = """
<domain type='kvm'><name>vm1</name>
  <os><loader>/usr/share/OVMF.fd</loader><nvram>/var/lib/nvram/vm1.fd</nvram><kernel>relative</kernel></os>
  <devices>
    <disk type='file' device='disk'><driver type='qcow2'/><source file='/a b.qcow2'/><target dev='vda'/></disk>
    <disk type='block'><source dev='/dev/vg/lv'/><target dev='vdb'/></disk>
    <disk type='network'><driver type='raw'/><source protocol='rbd' name='x'/><target dev='vdc'/></disk>
    <disk type='file' device='cdrom'><target dev='sda'/></disk>
    <disk type='file'><source file='/r'/><target dev='vdd'/><readonly/></disk>
    <disk type='file'><source/><target dev='vde'/></disk>
    <disk type='file'><source file='/l'><encryption format='luks'/></source><target dev='vdf'/></disk>
    <disk type='file'><source file='/l'/><target dev='vdg'/><encryption format='luks'/></disk>
    <tpm><backend type='emulator'/></tpm>
  </devices>
</domain>"""


def test_disks():
    found = {disk.name: disk for disk in domxml.disks(DOMAIN)}
    assert (found["vda"].format, found["vda"].path) == ("qcow2", "/a b.qcow2")
    assert (found["vdb"].format, found["vdb"].path, found["vdb"].type) == ("raw", "/dev/vg/lv", "block")
    assert found["vdc"].path is None
    assert [name for name, disk in found.items() if disk.encrypted] == ["vdf", "vdg"]
    left_out = {name: disk.left_out_because for name, disk in found.items()}
    assert left_out == {
        "vda": None, "vdb": None, "vdc": None, "sda": "is a cdrom", "vdd": "is read-only", "vde": "is empty",
        "vdf": None, "vdg": None,
    }


def test_what_names_the_images():
    """All that the XML has of a backing chain; another image of a network's is another name."""
    xml = """<domain><devices>
    <disk type='file'><source file='/top'/><backingStore type='file'><format type='qcow2'/><source file='/middle'/>
      <backingStore type='block'><source dev='/dev/base'/><backingStore/></backingStore></backingStore>
      <mirror type='file'><source file='/copy'/><backingStore type='file'><source file='/below the copy'>
        <encryption format='luks'/></source></backingStore></mirror><target dev='vda'/></disk>
    <disk type='network'><source protocol='rbd' name='pool/a'><host name='h'/></source><target dev='vdb'/></disk>
    <disk type='volume'><source pool='p' volume='v'/><target dev='vdc'/></disk>
    <disk type='file' device='cdrom'><target dev='sda'/></disk></devices></domain>"""
    found = domxml.disks(xml)
    assert {disk.name: disk.layers for disk in found} == {
        "vda": ["/top", "/middle", "/dev/base"], "vdb": ["rbd pool/a"], "vdc": ["p v"], "sda": [],
    }
    assert not any(disk.encrypted for disk in found)
    then = f"<domaincheckpoint><name>c</name>{xml}</domaincheckpoint>"
    assert domxml.images_then(then) == {"vda": "/top", "vdb": "rbd pool/a", "vdc": "p v"}
    assert domxml.images_then("<domaincheckpoint/>") == {}


BASE = "<backingStore type='file'><format type='raw'/><source file='/base'>{}</source>{}</backingStore>"


DATA = "<dataStore type='file'><format type='raw'/><source file='/data'>{}</source></dataStore>"


@pytest.mark.parametrize("below, layers, formats, ends", [
    ("", ["/top"], ["qcow2"], False),
    ("<backingStore/>", ["/top"], ["qcow2"], True),
    (BASE.format("", ""), ["/top", "/base"], ["qcow2", "raw"], False),
    (BASE.format("", "<backingStore/>"), ["/top", "/base"], ["qcow2", "raw"], True),
    ("<backingStore><source file='/base'/></backingStore>", ["/top", "/base"], ["qcow2", None], False),
])
def test_what_the_xml_has_below_an_image(below, layers, formats, ends):
    disk, = domxml.disks(
        f"<domain><devices><disk><driver type='qcow2'/><source file='/top'/>{below}<target dev='vda'/></disk></devices>"
        "</domain>"
    )
    assert (disk.layers, disk.formats, disk.ends) == (layers, formats, ends)
    assert disk.kind_of_qemu is None


@pytest.mark.parametrize("source, what", [
    ("<source file='/l'/>", None),
    ("<source protocol='rbd' name='x'/>", "a disk of type network"),
    ("<source file='/l'><encryption format='luks'/></source>", "an encrypted disk"),
    ("<source file='/l'/><encryption format='luks'/>", "an encrypted disk"),
    ("<source file='/l'/>" + BASE.format("<encryption format='luks'/>", ""), "an encrypted disk"),
    ("<source file='/l'>" + DATA.format("<encryption format='luks'/>") + "</source>", "an encrypted disk"),
    ("<source file='/l'/>" + BASE.format(DATA.format("<encryption format='luks'/>"), ""), "an encrypted disk"),
    ("<source file='/l'>" + DATA.format("<slices/>") + "</source>", "a disk that is a slice of a file"),
    ("<source file='/l'><slices/></source>", "a disk that is a slice of a file"),
    ("<source file='/l'/>" + BASE.format("<slices/>", ""), "a disk that is a slice of a file"),
])
def test_what_the_file_alone_does_not_say(source, what):
    disk, = domxml.disks(
        f"<domain><devices><disk type='{'network' if 'rbd' in source else 'file'}'>{source}<target dev='vda'/></disk>"
        "</devices></domain>"
    )
    assert disk.kind_of_qemu == what
    assert disk.encrypted == ("encryption" in source)


@pytest.mark.parametrize("driver, bus, controller, is_on_one", [
    ("", "virtio", "", False),
    ("<driver name='qemu' iothread='1'/>", "virtio", "", True),
    ("<driver name='qemu'><iothreads><iothread id='2'/></iothreads></driver>", "virtio", "", True),
    ("", "scsi", "<driver iothread='1'/>", True),
    ("", "scsi", "<driver><iothreads><iothread id='2'/></iothreads></driver>", True),
    ("", "scsi", "<driver queues='2'/>", False),
    ("", "sata", "<driver iothread='1'/>", False),
])
def test_a_disk_on_an_iothread(driver, bus, controller, is_on_one):
    """It, or the SCSI controller that it is at."""
    found = domxml.disks(
        f"<domain><devices><controller type='scsi' index='0'><driver iothread='1'/></controller>"
        f"<controller type='scsi' index='2'>{controller}</controller>"
        f"<disk type='file'>{driver}<source file='/x'/><target dev='vda' bus='{bus}'/>"
        f"<address type='drive' controller='2' bus='0' target='0' unit='0'/></disk></devices></domain>"
    )
    assert [disk.on_iothread for disk in found] == [is_on_one]


@pytest.mark.parametrize("attribute, source, inside, why", [
    ("file", "file='/r'", "", None),
    ("vhostuser", "type='unix' path='/s'", "", "is a vhost-user disk, whose data QEMU does not read"),
    ("file", "file='/r'", "<transient/>", "is transient, and libvirt makes no backup job of such a disk"),
    ("file", "file='/r'", "<target dev='sda' bus='sd'/>",
     "is on the bus sd, and libvirt makes no backup job of such a disk"),
])
def test_what_libvirt_makes_no_backup_job_of(attribute, source, inside, why):
    disk, = domxml.disks(
        f"<domain><devices><disk type='{attribute}'><source {source}/>{inside}<target dev='sda'/></disk></devices>"
        "</domain>"
    )
    assert disk.no_job_because == why


@pytest.mark.parametrize("xml, names", [
    ("<disk type='vhostvdpa'><source dev='/dev/vhost-vdpa-0'/>", ["/dev/vhost-vdpa-0"]),
    ("<disk type='nvme'><source type='pci' namespace='1'><address domain='0x0000' bus='0x65'/></source>",
     ["1 0x0000 0x65"]),
    ("<disk type='dir'><source dir='/files'/>", ["/files"]),
])
def test_devices_that_only_qemu_can_read(xml, names):
    """Their nodes are no images: qemu-img and qemu-nbd would read something else, or wait for ever."""
    disk, = domxml.disks(f"<domain><devices>{xml}<target dev='vda'/></disk></devices></domain>")
    assert (disk.path, disk.layers) == (None, names)
    assert disk.kind_of_qemu == f"a disk of type {disk.type}"


def test_files_are_absolute_paths():
    assert file_elements.files(DOMAIN) == [("loader", "/usr/share/OVMF.fd"), ("nvram", "/var/lib/nvram/vm1.fd")]
    assert domxml.has_tpm(DOMAIN)
    assert not domxml.has_agent(DOMAIN)


def test_names_are_read_as_they_are_written():
    """Prefixes belong to names, and comments are there for whoever asks for them."""
    text = '<a xmlns:x="urn:x"><x:b y:c="1"/>one<!-- two -->three</a>'
    root = domxml.parse(text, "x")
    assert (root.attrib, root.find("x:b").attrib, root.find("x:b").tail) == (
        {"xmlns:x": "urn:x"}, {"y:c": "1"}, "onethree",
    )
    assert len(domxml.parse(text, "x", comments=True)) == 2


def test_files_of_every_kind():
    xml = """<domain><os><loader>/l</loader><nvram type='block'><source dev='/dev/v'/></nvram><shim>/s</shim>
      <varstore path='/v.json' template='/t'/><kernel>/k</kernel></os></domain>"""
    assert file_elements.files(xml) == [
        ("loader", "/l"), ("nvram", "/dev/v"), ("varstore", "/v.json"), ("kernel", "/k"), ("shim", "/s"),
    ]
    assert file_elements.remote_firmware(xml) == []
    xml = "<domain><os><nvram type='network'><source protocol='nbd' name='x'/></nvram></os></domain>"
    assert (file_elements.files(xml), file_elements.remote_firmware(xml)) == ([], ["its nvram, of type network"])


@pytest.mark.parametrize("text", [
    '<!DOCTYPE domain [<!ENTITY a "b">]><domain>&a;</domain>', "<domain>&a;</domain>", "<domain>", "", "text", "\0",
])
def test_entities_and_what_is_no_xml(text):
    with pytest.raises(Error):
        domxml.parse(text, "domain XML")


def test_backup_and_checkpoint_quote_what_they_are_given():
    root = domxml.parse(domxml.backup(
        {"transport": "unix", "socket": "/a&b.sock"},
        [("vda", "a&1", "c<1", "/s'.scratch"), ("vdb", "b", None, "/t")], ["vdc"],
    ), "x")
    assert root.find("server").get("socket") == "/a&b.sock"
    assert root.find("disks/disk").get("exportname") == "a&1"
    modes = {disk.get("name"): (disk.get("backupmode"), disk.get("incremental")) for disk in root.iter("disk")}
    assert modes == {"vda": ("incremental", "c<1"), "vdb": ("full", None), "vdc": (None, None)}
    assert domxml.backup_endpoint(domxml.backup({"transport": "unix", "socket": "/x"}, [], [])) == "/x"
    assert domxml.backup_endpoint('<domainbackup>\n  <server socket="/a\tb"/>\n</domainbackup>') == "/a\tb"  # libvirt's
    tcp = {"transport": "tcp", "name": "::1", "port": "49153", "tls": "yes"}
    assert domxml.backup_endpoint(domxml.backup(tcp, [], [])) == "::1:49153"
    xml = domxml.checkpoint("c1", 'vnb {"a": "<"}', ["vda"], ["vdb"])
    assert domxml.bitmaps(xml) == {"vda": "c1"}
    assert domxml.about(xml) == {"a": "<"}


def test_a_checkpoint_of_some_disks():
    """libvirt takes none with a parent that it does not know, nor with a disk that the domain does not have."""
    parent = "<parent><name>c2</name></parent><disks>"
    xml = domxml.checkpoint("c3", "", ["vda", "vdb", "vdc"], []).replace("<disks>", parent)
    some = domxml.checkpoint_of(xml, ["vda"], ["vda", "vdb"])
    assert domxml.parse(some, "x").find("parent") is None
    assert domxml.bitmaps(some) == {"vda": "c3"}
    assert [disk.get("name") for disk in domxml.parse(some, "x").iterfind("./disks/disk")] == ["vda", "vdb"]
    assert domxml.bitmaps(domxml.checkpoint_of_one(xml, "vdb")) == {"vdb": "c3"}


@pytest.mark.parametrize("state, away", [(' state="connected"', False), (' state="disconnected"', True), ("", False)])
def test_an_agent_that_is_away(state, away):
    """A domain that is off, and an old libvirt, say nothing of it."""
    channel = f'<channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"{state}/></channel>'
    xml = f"<domain><devices>{channel}</devices></domain>"
    assert (domxml.has_agent(xml), domxml.is_agent_away(xml)) == (True, away)
    assert not domxml.is_agent_away(DOMAIN)
