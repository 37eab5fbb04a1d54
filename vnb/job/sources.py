# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Sources: what a backup reads from. A running domain by libvirt's backup job, a domain that is off or plain image
files by qemu-nbd. All have the same few methods, so that levels, catalogs and the end of a job know no difference.
"""

from vnb.base import ssh
from vnb.job.source_images import Images
from vnb.job.source_running import Running
from vnb.job.source_stopped import Stopped
from vnb.job.source_vanished import Gone
from vnb.virt.domain import Domain
from vnb.virt.failures import NoDomain


def open_source(options):
    """The source that the options of vnb-checkpoint mean; see vnb.job.job.begin. Raises Error."""
    if options["images"]:
        return Images(options["images"])
    domain = Domain(options["uri"], options["domain"], options["user"], options["password_file"])
    domain.refuse_managed_save()
    host = ssh.Host.of_uri(domain.uri, **options["ssh"])
    if domain.is_active or options["start_paused"]:
        return Running(domain, host, start=not domain.is_active)
    return Stopped(domain)


def source_of(record):
    """The source of a job from its record, by a connection made now: the daemon may have been restarted."""
    if record.kind == "images":
        return Images(record.images)
    try:
        domain = Domain(record.uri, record.head["uuid"], record.user, record.password_file)
    except NoDomain:
        return Gone(ssh.Host.of_uri(record.uri, **record.ssh))
    domain.what = domain.name  # nobody has typed its UUID
    if record.kind == "stopped":
        return Stopped(domain)
    return Running(domain, ssh.Host.of_uri(domain.uri, **record.ssh))
