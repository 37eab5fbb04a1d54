# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which source a backup has: by the options of who begins it, and by the record of who has to end it."""

from __future__ import annotations

from vnb.base import ssh
from vnb.base.errors import Error
from vnb.job.source_images import Images
from vnb.job.source_running import Running
from vnb.job.source_stopped import Stopped
from vnb.job.source_vanished import Gone
from vnb.virt.domain import Domain
from vnb.virt.failures import NoDomain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vnb.job.record import Record
    from vnb.job.source import Source


SOURCES: dict[str, Any] = {source.kind: source for source in (Images, Running, Stopped)}


def open_source(options: dict[str, Any]) -> Source:
    """The Source that the options of vnb-checkpoint mean; see vnb.job.job.begin. Raises Error."""
    for source in SOURCES.values():
        if source.option is not None and options[source.option]:
            return source.of_options(options)
    domain = Domain(options["uri"], options["domain"], options["user"], options["password_file"])
    domain.refuse_managed_save()
    host = ssh.Host.of_uri(domain.uri, **options["ssh"])
    if domain.is_active or options["start_paused"]:
        return Running(domain, host, start=not domain.is_active)
    return Stopped(domain)


def source_of(record: Record) -> Any:
    """The source of a job from its record, by a connection made now: libvirt may have been restarted. Raises Error."""
    if record.kind not in SOURCES:
        raise Error(record.head["domain"], f'its job is of a kind that this vnb does not know: "{record.kind}"')
    try:
        return SOURCES[record.kind].of_record(record)
    except NoDomain:
        return Gone.of_record(record)
