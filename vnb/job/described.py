# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt says of a domain, and what checkpoints of ours say of themselves."""

from __future__ import annotations

from vnb.virt import domxml
from vnb.virt.domain import Domain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vnb.job.record import Record
    from vnb.job.source import Wanted



def abouts(domain: Domain) -> dict[str, dict[str, Any]]:
    found = {name: domxml.about(xml) for name, xml in domain.checkpoints().items()}
    return {name: about for name, about in found.items() if about is not None}


def checkpoint_xml(wanted: Wanted) -> str | None:
    """The XML of the checkpoint of a vnb.job.source.Wanted, or None."""
    if wanted.checkpoint is None:
        return None
    with_bitmap = [disk.name for disk in wanted.disks if disk.has_bitmap]
    without = [disk.name for disk in wanted.disks if not disk.has_bitmap] + wanted.others
    return domxml.checkpoint(wanted.checkpoint, wanted.description, with_bitmap, without)


def domain_of(record: Record) -> Domain:
    """The domain of a job's record, by a connection made now. Raises NoDomain."""
    domain = Domain(record.uri, record.head["uuid"], record.user, record.password_file)
    domain.what = domain.name  # nobody has typed its UUID
    return domain


def domain_fields(domain: Domain) -> dict[str, Any]:
    fields: dict[str, Any] = {"domain_xml": domain.xml(), "checkpoint_xml": None}
    if domain.is_persistent:
        fields["inactive_xml"] = domain.xml(inactive=True)
        fields["autostart"] = bool(domain.call("autostart"))
    return fields
