# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-config: what becomes of each part of a domain's XML."""

from xml.etree import ElementTree

import pytest

from vnb.adjust import Domain, Place, Wishes
from vnb.errors import Error

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
        "sdc: is not in the backup: removed from the domain", "vdb: is not in the backup: removed from the domain",
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
    ), {"vda": None})
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


def test_namespaces_survive():
    root, _ = adjusted(xml(rest=(
        "<metadata><o:os xmlns:o='http://libosinfo.org/xmlns/libvirt/domain/1.0'/></metadata>"
        "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-s'/></q:commandline>"
    )))
    assert root.find("{http://libvirt.org/schemas/domain/qemu/1.0}commandline") is not None
    assert root.find("metadata/{http://libosinfo.org/xmlns/libvirt/domain/1.0}os") is not None


@pytest.mark.parametrize("text, reason", [
    (None, "stdin: p has no domain XML: it was no libvirt domain"),
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
