# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that is gone: only the end of its job is left to do."""

from __future__ import annotations

from vnb.base.errors import Error
from vnb.base.ssh import Host
from vnb.job.cleanup import end_servers, remove_files
from vnb.job.source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vnb.job.record import Record
    from vnb.job.source import Journal
    from vnb.virt.export_clients import Clients


class Gone(Source):
    """
    A domain that was undefined meanwhile, or was a transient one: with its QEMU the job has ended.

    host: where it was, None for here. Nothing can be asked of it, and no job begins here.
    """

    kind = "gone"
    is_gone = True

    def __init__(self, host: Host | None) -> None:
        self._host = host

    @classmethod
    def of_record(cls, record: Record) -> Gone:
        return cls(None if record.uri is None else Host.of_uri(record.uri, **record.ssh))

    def have(self) -> dict[str, dict[str, str]]:
        """No checkpoint: libvirt forgot them with the domain."""
        return {}

    def end(self, journal: Journal, clients: Callable[[], Clients], careful: bool) -> None:
        """End what the job started here, and remove its files."""
        end_servers(journal.record)
        remove_files(journal, self._host)

    def delete_checkpoint(self, name: str) -> None:
        """There is none. Whose its bitmaps are now is not known."""

    def _refuse(self, *_: object) -> Any:
        raise Error("the domain", "is gone")

    disks: Any = _refuse
    size_of: Any = _refuse
    layers_now: Any = _refuse
    allocated: Any = _refuse
    changed: Any = _refuse
    endpoint: Any = _refuse
    begin: Any = _refuse
    exports: Any = _refuse
