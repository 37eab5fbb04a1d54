# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains of libvirt: their state, disks and directories; jobs, agent and checkpoints are of its base classes."""

from __future__ import annotations

import os

import libvirt

from vnb.base import waiting
from vnb.base.errors import Error
from vnb.virt import domxml
from vnb.virt.agent import Agent
from vnb.virt.checkpoints import Checkpoints
from vnb.virt.connection import error_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.base.ssh import Host

SYSTEM_ROOT = "/var/lib/libvirt/qemu"  # of the directories that the system's daemon makes for domains
SHORT_NAME = 20  # characters of a domain's name in these
MARK = "urn:vnb:started"  # the namespace of what we write into the live XML of a domain that we start


def short_names(name: str) -> set[bytes]:
    """
    What libvirt may put of a domain's name into paths: virDomainDefGetShortName() takes 20 characters.

    In the locale C characters are bytes.
    """
    return {os.fsencode(name[:SHORT_NAME]), os.fsencode(name)[:SHORT_NAME]}


class Domain(Checkpoints, Agent):
    """A domain; see vnb.virt.handle.Handle."""

    def refuse_managed_save(self) -> None:
        """
        Raise Error where the domain is off, and its memory is saved.

        The disks alone are those of a domain after a power cut, and a start would use the saved memory up.
        """
        if not self.is_active and self.call("hasManagedSaveImage"):
            raise Error(
                self.name, f"is off with its memory saved by libvirt: virsh start {self.name} resumes it for a backup, "
                f"virsh managedsave-remove {self.name} gives up the memory"
            )

    def size_of(self, disk: str) -> int:
        """The size in bytes of a disk (name) as the guest sees it."""
        return self.call("blockInfo", disk)[0]

    def sharer(self, disk: domxml.Disk) -> str | None:
        """
        The name of another domain that runs and has a disk of the same source, or None.

        libvirt 11.0 to 11.4 asks QEMU before it describes a domain. If QEMU hangs, this takes half a minute.
        """
        ours = self._source_of(disk)
        for other in self.call_connection("listAllDomains", libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            try:
                if other.UUIDString() == self.uuid:
                    continue
                with waiting.on(f"libvirt to describe the domain {other.name()}"):
                    xml = other.XMLDesc()
            except libvirt.libvirtError as error:
                if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                    continue  # it has gone
                raise error_of(self.what, error) from None
            if any(ours == self._source_of(disk) for disk in domxml.disks(xml) if disk.shareable):
                return other.name()
        return None

    def _source_of(self, disk: domxml.Disk) -> object:
        """What tells the source of a disk from others, whatever it is called, as far as that can be known here."""
        path = disk.path or self._volume_path(disk)
        if path is None or not self.is_local:
            return path or disk.layers[:1]
        try:
            found = os.stat(path)
        except OSError:
            return path
        return found.st_rdev or (found.st_dev, found.st_ino)

    def _volume_path(self, disk: domxml.Disk) -> str | None:
        """The path of a volume of a storage pool, or None for other disks."""
        if disk.volume is None:
            return None
        try:
            pool = self._connection.storagePoolLookupByName(disk.volume[0])
            return pool.storageVolLookupByName(disk.volume[1]).path()
        except libvirt.libvirtError:
            return None  # a domain that runs may have outlived it

    def private_directory(self, host: Host | None = None) -> str:
        """
        The directory that libvirt made for this running domain, which only QEMU's user and root can enter.

        host: where it is.
        """
        import glob

        session = self.uri.partition("?")[0].endswith("/session")
        name = f"domain-{self.id}-*"
        if host is not None:
            root = '"${XDG_CONFIG_HOME:-$HOME/.config}"/libvirt/qemu/lib' if session else SYSTEM_ROOT
            found = host.glob(self.what, f"{root}/{name}")
        else:
            root = SYSTEM_ROOT
            if session:
                config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
                root = os.path.join(config, "libvirt/qemu/lib")
            found = [path for path in glob.glob(f"{glob.escape(root)}/{name}") if os.path.isdir(path)]
        # A crash leaves the directories of other domains behind, and libvirt counts ids from 1 again.
        names = short_names(self.name)
        found = [path for path in found if os.fsencode(os.path.basename(path)).split(b"-", 2)[2] in names]
        if len(found) != 1:
            raise Error(self.what, f"no directory of this domain below {root}: name a socket with --socket")
        return found[0]

    @property
    def nvram_directory(self) -> str:
        """Where libvirt keeps what UEFI remembers, unless a domain's XML says so itself."""
        if not self.uri.partition("?")[0].endswith("/session"):
            return "/var/lib/libvirt/qemu/nvram"
        return os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "libvirt/qemu/nvram")

    def is_paused_by_error(self) -> bool:
        """Whether QEMU stopped the guest because it could not write."""
        state, reason = self.call("state")
        return state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR

    @property
    def is_suspended(self) -> bool:
        """Whether somebody, as we, has paused it: not QEMU, and no snapshot or migration."""
        state, reason = self.call("state")
        return state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_USER

    def resume(self) -> None:
        """Have a paused guest run; harmless where somebody was faster."""
        try:
            self.call("resume")
        except Error:
            if self.is_paused:
                raise

    def start_paused(self) -> tuple[int, str]:
        """
        Start the domain, paused, for as long as this connection lasts; returns what is_started() knows it by.

        libvirt counts ids from 1 again when the host has booted. So a mark goes into the live XML, where it lasts as
        long as this QEMU and longer than libvirtd.
        """
        self.call("createWithFlags", libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY)
        mark = os.urandom(16).hex()
        self.call(
            "setMetadata", libvirt.VIR_DOMAIN_METADATA_ELEMENT, f'<started mark="{mark}"/>', "vnb", MARK,
            libvirt.VIR_DOMAIN_AFFECT_LIVE,
        )
        return self.id, mark

    def is_started(self, id_: int, mark: str) -> bool:
        """Whether it runs in the very QEMU for which start_paused() returned these."""
        try:
            found = self._domain.metadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT, MARK, libvirt.VIR_DOMAIN_AFFECT_LIVE
            )
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA or not self.is_active:
                return False
            raise error_of(self.what, error) from None
        return self.id == id_ and mark in found

    def destroy(self) -> None:
        """Pull the plug; harmless where somebody was faster."""
        try:
            self.call("destroy")
        except Error:
            if self.is_active:
                raise
