# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt: connections, domains and their backup jobs. The only user of libvirt-python."""

import os
import time

import libvirt

from vnb import domxml
from vnb.errors import Error

JOB_END_SECONDS = 60  # ending a pull job takes milliseconds; a guest that is shutting down keeps it for 30 s

# libvirt prints each error on stderr itself, unless told not to: we say it, once.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


def default_uri():
    """libvirt's own default, but the system's daemon for root and the session's for others."""
    return os.environ.get("LIBVIRT_DEFAULT_URI") or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")


def error_of(what, error):
    """A libvirtError as an Error, with libvirt's own words."""
    return Error(what, error.get_error_message() or str(error))


class Domain:
    """
    A domain, looked up anew: the daemon may have been restarted since the last time.

    uri (str or None): None for the default. name (str): a name or a UUID. Raises Error, as all methods do.
    """

    def __init__(self, uri, name):
        self.uri = uri or default_uri()
        try:
            self._connection = libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None
        self.what = name
        try:
            try:
                self._domain = self._connection.lookupByName(name)
            except libvirt.libvirtError:
                try:
                    self._domain = self._connection.lookupByUUIDString(name)
                except libvirt.libvirtError:
                    raise Error(name, f"no such domain at {self.uri}") from None
            self.name = self._domain.name()
            self.uuid = self._domain.UUIDString()
        except libvirt.libvirtError as error:
            raise error_of(name, error) from None

    def close(self):
        """Let go of the connection."""
        try:
            self._connection.close()
        except libvirt.libvirtError:
            return  # the daemon was faster

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def call(self, function, *args):
        """function(*args) of libvirt's domain object, its error as an Error."""
        try:
            return getattr(self._domain, function)(*args)
        except libvirt.libvirtError as error:
            raise error_of(self.what, error) from None

    @property
    def is_active(self):
        return bool(self.call("isActive"))

    @property
    def is_persistent(self):
        return bool(self.call("isPersistent"))

    def xml(self, inactive=False):
        """The domain's XML, live or as it will be at the next start, without its secrets."""
        return self.call("XMLDesc", libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)

    def size_of(self, disk):
        """The size in bytes of a disk (name) as the guest sees it."""
        return self.call("blockInfo", disk)[0]

    def private_directory(self):
        """
        The directory that libvirt made for this running domain, which only QEMU's user and root can enter.

        Its name is made of the domain's id and a part of its name (virDomainDefGetShortName).
        """
        import glob

        roots = ["/var/lib/libvirt/qemu"]
        if self.uri.partition("?")[0].endswith("/session"):
            config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
            roots = [os.path.join(config, "libvirt/qemu/lib")]
        found = [
            path for root in roots for path in glob.glob(f"{glob.escape(root)}/domain-{self.call('ID')}-*")
            if os.path.isdir(path)
        ]
        if len(found) != 1:
            raise Error(self.what, f"no directory of this domain below {roots[0]}: name a socket with --socket")
        return found[0]

    def running_job(self):
        """What kind of job runs, in words, or None. Never waits."""
        if self.call("jobInfo")[0] == libvirt.VIR_DOMAIN_JOB_NONE:
            return None
        operation = self.call("jobStats").get("operation")
        names = {
            libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "backup",
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration",
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "migration",
            libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
            libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
            libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
        }
        return names.get(operation, "job")

    def backup_socket(self):
        """The socket of the running pull-mode backup job, or None where there is no backup job."""
        if self.running_job() != "backup":
            return None
        try:
            return domxml.backup_socket(self._domain.backupGetXMLDesc())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                return None
            raise error_of(self.what, error) from None

    def begin_backup(self, backup_xml, checkpoint_xml):
        """
        Start a backup job. Raises BrokenBitmap where a bitmap is missing or inconsistent; nothing is left then.
        """
        try:
            self._domain.backupBegin(backup_xml, checkpoint_xml, 0)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT:
                raise BrokenBitmap(self.what, error.get_error_message()) from None
            raise error_of(self.what, error) from None

    def end_backup(self):
        """End the running job, and come back when it is gone. A pull job has no other end than abort."""
        deadline = time.monotonic() + JOB_END_SECONDS
        try:
            self._domain.abortJob()
            # The abort is answered before the block jobs are gone; polling is what is left without an event loop.
            while self._domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
                if time.monotonic() > deadline:
                    raise Error(self.what, f"the backup job is still there after {JOB_END_SECONDS} seconds")
                time.sleep(0.01)
        except libvirt.libvirtError as error:
            if self._domain.isActive() and self.running_job() is not None:
                raise error_of(self.what, error) from None

    def checkpoints(self):
        """{name: XML without the domain's} of all checkpoints."""
        found = self.call("listAllCheckpoints")
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        try:
            return {checkpoint.getName(): checkpoint.getXMLDesc(flags) for checkpoint in found}
        except libvirt.libvirtError as error:
            raise error_of(self.what, error) from None

    def checkpoint_xml(self, name):
        """A checkpoint's XML, for a ledger."""
        try:
            return self._domain.checkpointLookupByName(name).getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
        except libvirt.libvirtError as error:
            raise error_of(self.what, error) from None

    def delete_checkpoint(self, name):
        """Delete a checkpoint and its bitmaps; harmless where it is gone already."""
        try:
            self._domain.checkpointLookupByName(name).delete(0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                raise error_of(f"{self.what}: checkpoint {name}", error) from None


class BrokenBitmap(Error):
    """A bitmap that a backup was to start from is missing or inconsistent."""
