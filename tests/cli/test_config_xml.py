# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-config: what becomes of each part of a domain's XML."""

from xml.etree import ElementTree

import pytest

from vnb.base.errors import Error
from vnb.virt.domain_rewrite import NO_XML, Domain, Place, Wishes

QCOW2 = Place("file", "/restore/vda.qcow2", "qcow2")
RAW = Place("file", "/restore/vda.raw", "raw")


def xml(devices="", os_="", rest="", attributes=""):
    return (
        f"<domain type='kvm' {attributes}><name>vm1</name><uuid>7f3d6a52-8c3e-4d0e-9d55-4b1d5f4f5b11</uuid>{rest}"
        f"<os><type>hvm</type>{os_}</os><devices>{devices}</devices></domain>"
    )


def adjusted(text, places=None, files=None, inactive=None, **wishes):
    """(root of the adjusted XML, what was said)"""
    said = []
    domain = Domain({"point": "p", "domain_xml": text, "inactive_xml": inactive}, said.append)
    domain.adopt_firmware()
    domain.adjust(Wishes(**wishes), places or {}, files or {})
    return ElementTree.fromstring(domain.xml()), said  # noqa: S314 - our own


def disk(text, place=QCOW2):
    """(the adjusted disk, what was said)"""
    root, said = adjusted(xml(text), {"vda": place})
    return root.find("./devices/disk"), said


VDA = "<target dev='vda' bus='virtio'/>"


def test_another_machine():
    """Two domains with one name, UUID or MAC address are one too many."""
    root, said = adjusted(xml(
        "<interface type='bridge'><mac address='52:54:00:00:00:01'/><virtualport type='openvswitch'>"
        "<parameters interfaceid='9c2f8c0e-0000-0000-0000-000000000001' profileid='p'/></virtualport></interface>"
        "<vsock model='virtio'><cid auto='no' address='3'/></vsock>",
        rest="<sysinfo type='smbios'><system><entry name='uuid'>7f3d6a52</entry><entry name='serial'>s</entry></system>"
             "</sysinfo>",
    ))
    assert root.findtext("name") == "restore_vm1"
    assert root.find("uuid") is None
    assert root.find(".//mac") is None
    assert root.find(".//parameters").attrib == {"profileid": "p"}
    assert root.find(".//cid").attrib == {"auto": "yes"}
    assert [entry.get("name") for entry in root.iter("entry")] == ["serial"]
    assert said == []


def test_the_same_machine():
    root, _ = adjusted(xml("<interface type='user'><mac address='52:54:00:00:00:01'/></interface>"), keep_identity=True)
    assert root.findtext("name") == "vm1"
    assert root.findtext("uuid") == "7f3d6a52-8c3e-4d0e-9d55-4b1d5f4f5b11"
    assert root.find(".//mac").get("address") == "52:54:00:00:00:01"


def test_name_is_the_user_s():
    assert adjusted(xml(), name="vm2")[0].findtext("name") == "vm2"
    assert adjusted(xml(), name="vm2", keep_identity=True)[0].findtext("name") == "vm2"


def test_name_that_is_none_does_not_matter_where_the_user_gives_one():
    assert adjusted("<domain><name>a/b</name></domain>", name="c")[0].findtext("name") == "c"


def test_generation_id_is_made_anew():
    """The guest is to notice that it was restored."""
    root, _ = adjusted(xml(rest="<genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>"), keep_identity=True)
    assert not root.findtext("genid")


@pytest.mark.parametrize("source", [
    "type='file'><source file='/images/vm1.qcow2' index='1'/><backingStore type='file'><format type='qcow2'/>"
    "<source file='/images/base.qcow2'/></backingStore>",
    "type='block'><source dev='/dev/vg/vm1'/>",
    "type='volume'><source pool='default' volume='vm1' mode='host'/>",
    "type='network'><auth username='u'><secret type='ceph' uuid='0'/></auth><source protocol='rbd' name='p/vm1'>"
    "<host name='mon' port='6789'/></source>",
    "type='file'><source file='/images/vm1.qcow2'><dataStore type='file'><format type='raw'/><source file='/d'/>"
    "</dataStore></source>",
    "type='nvme'><source type='pci' namespace='1' managed='yes'/>",
])
def test_disk_of_any_kind_becomes_the_restored_file(source):
    driver = "<driver name='qemu' type='raw' cache='none' io='native'/>"
    element, said = disk(f"<disk device='disk' {source}{driver}{VDA}</disk>")
    assert element.attrib == {"type": "file", "device": "disk"}
    assert element.find("source").attrib == {"file": "/restore/vda.qcow2"}
    assert len(element.find("source")) == 0
    assert element.find("driver").attrib == {"name": "qemu", "type": "qcow2", "cache": "none", "io": "native"}
    assert {child.tag for child in element} == {"source", "driver", "target"}
    assert said == []


def test_disk_on_a_block_device():
    element, _ = disk(f"<disk type='file'><source file='/x'/>{VDA}</disk>", Place("block", "/dev/vg/new", "raw"))
    assert element.get("type") == "block"
    assert element.find("source").attrib == {"dev": "/dev/vg/new"}
    assert element.find("driver").attrib == {"name": "qemu", "type": "raw"}


def test_disk_that_stays_where_it_was():
    element, _ = disk(f"<disk type='network'><source protocol='rbd' name='p/vm1'/>{VDA}</disk>", None)
    assert element.get("type") == "network"
    assert element.find("source").get("name") == "p/vm1"


@pytest.mark.parametrize("where", ["<source file='/x'>{}</source>", "<source file='/x'/>{}"])
def test_encrypted_disk_is_so_no_more(where):
    luks = "<encryption format='luks'><secret type='passphrase' uuid='0'/></encryption>"
    element, said = disk(f"<disk type='file'>{where.format(luks)}{VDA}</disk>")
    assert element.find(".//encryption") is None
    assert said == ["vda: was encrypted, its restored image is not"]


def test_metadata_cache_is_for_qcow2():
    text = f"<disk type='file'><driver type='qcow2'><metadata_cache/></driver><source file='/x'/>{VDA}</disk>"
    assert disk(text)[0].find("driver/metadata_cache") is not None
    assert disk(text, RAW)[0].find("driver/metadata_cache") is None


def test_shared_disk():
    text = f"<disk type='file'><source file='/x'/>{VDA}<shareable/></disk>"
    element, said = disk(text)
    assert element.find("shareable") is None
    assert said == ["vda: was shared by several domains, which a qcow2 image cannot be"]
    assert disk(text, RAW)[0].find("shareable") is not None


def test_media_and_disks_that_are_not_in_the_backup():
    root, said = adjusted(xml(
        f"<disk type='file'><source file='/x'/>{VDA}</disk>"
        "<disk type='network' device='cdrom'><source protocol='http' name='a'/><target dev='sda'/><readonly/></disk>"
        "<disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>"
        "<disk type='file' device='floppy'><source file='/f.img'/><target dev='fda'/></disk>"
        "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdc'/></disk>"
        "<disk type='file'><source file='/scratch.raw'/><target dev='vdb'/></disk>"
    ), {"vda": QCOW2})
    assert [element.find("target").get("dev") for element in root.iter("disk")] == ["vda", "sda", "sdb", "fda"]
    assert [element.get("type") for element in root.iter("disk")] == ["file"] * 4
    assert [source.get("file") for source in root.iter("source")] == ["/restore/vda.qcow2"]
    assert said == [
        "sda: the cdrom has no medium in it any more", "fda: the floppy has no medium in it any more",
        "sdc: was not restored: removed from the domain", "vdb: was not restored: removed from the domain",
    ]


def test_the_definition_rather_than_the_state():
    root, _ = adjusted(xml(attributes="id='3'"), inactive=xml(rest="<title>definition</title>"))
    assert root.findtext("title") == "definition"


def test_what_libvirt_adds_while_a_domain_runs():
    """Of a transient domain there is nothing but the live XML."""
    root, _ = adjusted(xml(
        "<interface type='network'><source network='default' portid='1' bridge='virbr0'/><target dev='vnet7'/>"
        "<alias name='net0'/></interface>"
        "<interface type='bridge'><source bridge='br0'/><target dev='mine'/><alias name='ua-lan'/></interface>"
        "<console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/><target type='serial' port='0'/></console>"
        "<serial type='file'><source path='/var/log/vm1'/></serial>"
        "<channel type='unix'><source mode='bind' path='/run/libvirt/qemu/channel/3-vm1/org.qemu.guest_agent.0'/>"
        "<target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>"
        f"<disk type='file'><source file='/x' index='2'/>{VDA}<alias name='virtio-disk0'/></disk>",
        rest="<seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+107</label>"
             "<imagelabel>+1:+1</imagelabel></seclabel><seclabel type='none' model='apparmor'/>",
        attributes="id='3'",
    ), {"vda": None}, keep_identity=True)
    assert "id" not in root.attrib
    assert [alias.get("name") for alias in root.iter("alias")] == ["ua-lan"]
    assert [target.get("dev") for target in root.findall("./devices/interface/target")] == ["mine"]
    assert root.find("./devices/interface/source").attrib == {"network": "default"}
    assert root.find("./devices/console/source") is None
    assert "tty" not in root.find("./devices/console").attrib
    assert root.find("./devices/serial/source").get("path") == "/var/log/vm1"
    assert root.find("./devices/channel/source") is None
    assert "state" not in root.find("./devices/channel/target").attrib
    assert [seclabel.get("type") for seclabel in root.iter("seclabel")] == ["none"]


@pytest.mark.parametrize("listen", [
    "", "<listen type='address' address='0.0.0.0'/>", "<listen type='network' network='n'/>",
])
def test_graphics_whose_password_is_lost_is_switched_off(listen):
    text = xml(f"<graphics type='vnc' port='5901' autoport='no' listen='0.0.0.0'>{listen}</graphics>")
    root, said = adjusted(text)
    graphics = root.find("./devices/graphics")
    assert graphics.attrib == {"type": "vnc"}
    assert [child.attrib for child in graphics] == [{"type": "none"}]
    assert said == [
        "vnc: switched off, since its password, if it had one, is not in the backup: set one, or say --keep-graphics"
    ]
    root, said = adjusted(text, keep_graphics=True)
    assert root.find("./devices/graphics").get("port") == "5901"
    assert said == []


@pytest.mark.parametrize("graphics", [
    "<graphics type='vnc' passwd='known' port='-1' autoport='yes'><listen type='address'/></graphics>",
    "<graphics type='vnc'><listen type='socket' socket='/run/vm1.vnc'/></graphics>",
    "<graphics type='spice'><listen type='none'/></graphics>", "<graphics type='egl-headless'/>",
])
def test_graphics_that_nobody_gets_at_stays(graphics):
    root, said = adjusted(xml(graphics))
    assert len(root.findall("./devices/graphics/listen[@type='none']")) == ("none" in graphics)
    assert said == []


def test_restored_files():
    root, said = adjusted(
        xml(os_="<kernel>/boot/k</kernel><initrd> /boot/i </initrd><dtb>/boot/d</dtb>"),
        files={("kernel", "/boot/k"): "/restore/k", ("initrd", "/boot/i"): "/restore/i", ("dtb", "/boot/d"): None},
    )
    texts = [root.findtext(f"os/{role}") for role in ("kernel", "initrd", "dtb")]
    assert texts == ["/restore/k", "/restore/i", "/boot/d"]
    assert said == ["dtb /boot/d is not in the backup: the domain needs it there"]


def test_nvram_that_is_a_source():
    os_ = "<nvram type='file' template='/usr/vars'><source file='/nvram/v'/></nvram>"
    root, _ = adjusted(xml(os_=os_), files={("nvram", "/nvram/v"): "/restore/v"})
    assert root.find("os/nvram/source").attrib == {"file": "/restore/v"}


def test_nvram_that_is_not_in_the_backup_is_not_shared_with_the_original():
    os_ = "<loader readonly='yes' type='pflash'>/usr/code</loader><nvram template='/usr/vars'>/nvram/v</nvram>"
    files = {("loader", "/usr/code"): "/usr/code", ("nvram", "/nvram/v"): None}
    root, said = adjusted(xml(os_=os_), files=files)
    assert root.find("os/nvram").attrib == {"template": "/usr/vars"}
    assert not root.findtext("os/nvram")
    assert said == ["nvram /nvram/v is not in the backup: the domain gets a new one"]
    assert adjusted(xml(os_=os_), files=files, keep_identity=True)[0].findtext("os/nvram") == "/nvram/v"


@pytest.mark.parametrize("nvram, where", [
    ("<nvram template='/usr/vars'>/nvram/v</nvram>", "/nvram/v"),
    ("<nvram type='file' template='/usr/vars'><source file='/nvram/v'/></nvram>", "/nvram/v"),
    ("<nvram type='block' template='/usr/vars'><source dev='/dev/vg/v'/></nvram>", "/dev/vg/v"),
    ("<nvram type='network' template='/usr/vars'><source protocol='nbd' name='v'><host name='h'/></source></nvram>",
     "on the network"),
    ("<varstore template='/usr/vars' path='/nvram/v.json'/>", "/nvram/v.json"),
])
def test_a_clone_never_has_what_the_original_writes(nvram, where):
    """With --no-files too: two machines that write one nvram break both."""
    tag = nvram[1:].partition(" ")[0]
    for files, why in ({}, "was not restored"), ({(tag, where): None}, "is not in the backup"):
        root, said = adjusted(xml(os_=nvram), files=files)
        element = root.find(f"os/{tag}")
        assert (element.attrib, len(element), element.text) == ({"template": "/usr/vars"}, 0, None)
        why = "is not in the backup" if where == "on the network" else why
        assert said == [f"{tag} {where} {why}: the domain gets a new one"]
    root, _ = adjusted(xml(os_=nvram), keep_identity=True)
    assert ElementTree.tostring(root.find(f"os/{tag}")).count(b"v") >= nvram.count("v")


def test_nvram_on_a_device_becomes_a_file():
    nvram = "<nvram type='block'><source dev='/dev/vg/v'><seclabel relabel='no'/></source></nvram>"
    root, said = adjusted(xml(os_=nvram), files={("nvram", "/dev/vg/v"): "/restore/v"})
    assert root.find("os/nvram").attrib == {"type": "file"}
    assert (root.find("os/nvram/source").attrib, len(root.find("os/nvram/source"))) == ({"file": "/restore/v"}, 0)
    root, _ = adjusted(xml(os_="<varstore path='/v.json'/>"), files={("varstore", "/v.json"): "/restore/v.json"})
    assert root.find("os/varstore").attrib == {"path": "/restore/v.json"}
    assert said == []


def test_a_loader_that_the_guest_writes_to():
    """Code and variables in one file: libvirt makes no new one of it."""
    text = xml(os_="<loader type='pflash' readonly='no'>/fw</loader>")
    with pytest.raises(Error, match="loader /fw was not restored, and the original writes to it"):
        adjusted(text)
    assert adjusted(text, files={("loader", "/fw"): "/restore/fw"})[0].findtext("os/loader") == "/restore/fw"
    assert adjusted(text, keep_identity=True)[0].findtext("os/loader") == "/fw"


SERIAL = (
    "<serial type='file'><source path='/var/log/vm1'/><target port='0'/></serial>"
    "<console type='file'><source path='/var/log/vm1'/><target type='serial' port='0'/></console>"
    "<parallel type='file'><source path='/other/vm1'/></parallel>"
    "<serial type='pty'><log file='/var/log/..' append='on'/></serial>"
)


def test_output_of_a_clone_does_not_go_into_the_original_s_files():
    root, said = adjusted(xml(SERIAL), directory="/restore")
    assert [source.get("path") for source in root.iter("source")] == ["/restore/vm1"] * 2 + ["/restore/parallel.2.log"]
    assert [log.attrib for log in root.iter("log")] == [{"file": "/restore/serial.log", "append": "on"}]
    assert said == [
        "serial: its output goes to /restore/vm1: /var/log/vm1 is the original's",
        "parallel: its output goes to /restore/parallel.2.log: /other/vm1 is the original's",
        "serial: its output goes to /restore/serial.log: /var/log/.. is the original's",
    ]
    root, said = adjusted(xml(SERIAL))
    assert [device.get("type") for device in root.find("devices")] == ["pty"] * 4
    assert not list(root.iter("log")) and not list(root.iter("source"))
    root, said = adjusted(xml(SERIAL), keep_identity=True, directory="/restore")
    assert root.find("./devices/serial/source").get("path") == "/var/log/vm1"
    assert said == []


def test_other_files_that_the_original_writes():
    devices = (
        "<memory model='nvdimm'><source><path>/pmem</path></source><target/></memory><memory model='dimm'/>"
        "<pstore backend='acpi-erst'><path>/pstore</path><size>8</size></pstore>"
        "<tpm model='tpm-crb'><backend type='emulator'><source type='dir' path='/tpm'/></backend></tpm>"
    )
    root, said = adjusted(xml(devices))
    assert [memory.get("model") for memory in root.iter("memory")] == ["dimm"]
    assert [child.tag for child in root.find("./devices/pstore")] == ["size"]
    assert root.find("./devices/tpm/backend/source") is None
    assert said == [
        "nvdimm /pmem: is not in the backup: removed from the domain",
        "pstore /pstore: is not in the backup: the domain gets a new one",
        "the state of its TPM is not in the backup: the guest finds a new one",
    ]
    root, said = adjusted(xml(devices), keep_identity=True)
    assert len(list(root.iter("memory"))) == 2
    assert said == ["the state of its TPM is not in the backup: the guest finds what this host still has of it, which "
                    "may be newer than the disks"]


def test_firmware_that_libvirt_chose_at_the_start():
    """The definition does not name it, and the nvram would be forgotten."""
    live = xml(os_="<loader readonly='yes' type='pflash'>/usr/code</loader><nvram>/nvram/v</nvram>")
    inactive = xml(os_="<firmware/>").replace("<os>", "<os firmware='efi'>")
    root, _ = adjusted(
        live, inactive=inactive, files={("loader", "/usr/code"): "/restore/code", ("nvram", "/nvram/v"): "/restore/v"},
    )
    assert root.find("os").attrib == {}
    assert root.findtext("os/loader") == "/restore/code"
    assert root.findtext("os/nvram") == "/restore/v"


def test_firmware_for_secure_boot_has_what_libvirt_switched_on_for_it():
    live = xml(os_="<loader secure='yes' type='pflash'>/c</loader><nvram>/v</nvram>", rest=(
        "<features><acpi/><smm state='on'/></features>"))
    inactive = xml(os_="<loader secure='yes'/><nvram template='/t'/>", rest="<features><acpi/></features>").replace(
        "<os>", "<os firmware='efi'>")
    root, _ = adjusted(live, inactive=inactive)
    assert [child.tag for child in root.find("features")] == ["acpi", "smm"]
    assert [(child.tag, child.text) for child in root.find("os")][1:] == [("loader", "/c"), ("nvram", None)]


@pytest.mark.parametrize("os_, adopts", [
    ("<os firmware='efi'><type>hvm</type></os>", True),
    ("<os firmware='efi'><nvram template='/t'/></os>", True),
    ("<os><loader type='pflash' readonly='yes'>/c</loader></os>", True),
    ("<os><loader type='pflash' readonly='yes' stateless='yes'>/c</loader></os>", False),
    ("<os firmware='efi'><nvram>/other</nvram></os>", False), ("<os firmware='efi'><varstore path='/o'/></os>", False),
    ("<os firmware='bios'/>", False), ("<os/>", False), ("", False),
])
def test_nvram_that_no_definition_names(os_, adopts):
    """Of a domain that is off there is no other XML, and what the guest remembers is in libvirt's own place."""
    domain = Domain({"point": "p", "domain_xml": f"<domain><name>n</name>{os_}</domain>"}, lambda _: None)
    assert domain.adopt_nvram("/nvram/n_VARS.fd") is adopts
    assert (("nvram", "/nvram/n_VARS.fd") in domain.files()) is adopts


FOREIGN = """<metadata>
    <!-- whose it is -->
    <a:app xmlns:a="urn:a" a:x="1">two
lines,\ttab <a:b /> and &lt;text&gt;&#13;</a:app>
<note xmlns="urn:default"><?keep this?>  <ns0:odd xmlns:ns0="urn:odd" /></note>
</metadata>"""


def test_metadata_come_back_as_they_were():
    """Prefixes, comments and white space in them are their owners', who may look at any of it."""
    head = {"point": "p", "domain_xml": f"<domain><name>n</name>{FOREIGN}<devices><disk/></devices></domain>"}
    domain = Domain(head, lambda _: None)
    domain.adjust(Wishes(), {}, {})
    assert f"  {FOREIGN}\n  <devices" in domain.xml()
    assert domain.xml() == domain.xml()


def test_namespaces_survive():
    root, _ = adjusted(xml(rest=(
        "<metadata><o:os xmlns:o='http://libosinfo.org/xmlns/libvirt/domain/1.0'/></metadata>"
        "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-s'/></q:commandline>"
    )))
    assert root.find("{http://libvirt.org/schemas/domain/qemu/1.0}commandline") is not None
    assert root.find("metadata/{http://libosinfo.org/xmlns/libvirt/domain/1.0}os") is not None


@pytest.mark.parametrize("text, reason", [
    (None, f"stdin: p has no domain XML: {NO_XML}"),
    ("<!DOCTYPE x [<!ENTITY e 'e'>]><domain><name>&e;</name></domain>",
     "domain XML: XML with a document type is not accepted"),
    ("<network><name>n</name></network>", "domain XML: is not a domain, but <network>"),
    ("<domain/>", "domain XML: has no name"),
    ("<domain><name>a/b</name></domain>",
     'domain XML: "restore_a/b" is no name for a domain: give another with --name'),
    ("<domain>", "domain XML: malformed XML: no element found: line 1, column 8"),
])
def test_what_is_no_domain(text, reason):
    with pytest.raises(Error) as error:
        adjusted(text)
    assert str(error.value) == reason


@pytest.mark.parametrize("text", [
    "<domain><name>n</name></domain>",
    "<domain><name>n</name><devices><disk/><graphics/><disk device='cdrom'/></devices></domain>",
    "<domain><name>n</name><os/><devices><interface><source/></interface><seclabel/></devices><seclabel/></domain>",
    "<domain><name>n</name><name>m</name><os/><os><nvram><source/></nvram></os></domain>",
])
def test_odd_domains_are_no_trouble(text):
    """libvirt will say what it thinks of them."""
    assert adjusted(text, {"vda": QCOW2})[0].tag == "domain"
