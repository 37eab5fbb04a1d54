# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that is gone: only the end of its job is left to do."""

from vnb.job.cleanup import end_servers, remove_files


class Gone:
    """
    A domain that was undefined meanwhile, or was a transient one: with its QEMU the job has ended.

    host (vnb.base.ssh.Host or None): where it was.
    """

    kind = "gone"

    def __init__(self, host):
        self._host = host

    def close(self):
        """Nothing is held."""

    def have(self):
        """No checkpoint: libvirt forgot them with the domain."""
        return {}

    abouts = have

    def end(self, job):
        """End what the job started here, and remove its files."""
        end_servers(job.record)
        remove_files(job, self._host)

    def delete_checkpoint(self, name):
        """There is none."""

    def remove_bitmaps(self, record):
        """Whose images these are now is not known."""
