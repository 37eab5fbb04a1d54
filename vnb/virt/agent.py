# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest agent: file systems frozen and thawed, and what it says of the guest, within bounded time."""

from __future__ import annotations

import contextlib

import libvirt

from vnb.virt.connection import error_of
from vnb.virt.failures import Unanswered
from vnb.virt.handle import Handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

# For the guest agent to answer; libvirt itself would wait for ever. A freeze writes back all that is dirty, and Windows
# gives its writers a minute; no job runs yet that somebody would have to watch over. Thawing and asking is quick.
FREEZE_SECONDS, THAW_SECONDS, INFO_SECONDS = 60, 5, 5
AGENT_COMMAND_TIMEOUT = 112  # VIR_ERR_AGENT_COMMAND_TIMEOUT, which the binding may be too old for


class Agent(Handle):
    """The agent in the guest of a domain."""

    @contextlib.contextmanager
    def _agent_within(self, seconds: int) -> Iterator[None]:
        """
        Have the guest agent answer each question within some seconds. Raises libvirtError.

        libvirt keeps that for all who ask the agent of this domain, and tells nobody what it was before: afterwards
        it is libvirt's default again. A trim that others ask for may take its time.
        """
        self._domain.agentSetResponseTimeout(seconds)
        try:
            yield
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                self._domain.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)

    def freeze(self, mountpoints: Sequence[str]) -> int:
        """
        Freeze all file systems of the guest, or those at mountpoints; returns how many.

        Raises Unanswered where the agent may do it later, Error where it was refused: then nothing is frozen by us.
        """
        return self._ask_agent(FREEZE_SECONDS, "fsFreeze", mountpoints or None)

    def thaw(self) -> int:
        """Thaw the guest's file systems; returns how many. Raises Unanswered or Error."""
        return self._ask_agent(THAW_SECONDS, "fsThaw", None)

    def _ask_agent(self, seconds: int, function: str, *args: Any) -> Any:
        try:
            with self._agent_within(seconds):
                return getattr(self._domain, function)(*args)
        except libvirt.libvirtError as error:
            if _may_still_happen(error):
                raise Unanswered(self.what, error.get_error_message()) from None
            raise error_of(self.what, error) from None

    def guest_info(self) -> dict[str, Any] | None:
        """What the guest agent says of the guest, or None where there is no agent that answers."""
        try:
            with self._agent_within(INFO_SECONDS):
                return self._domain.guestInfo(0)
        except libvirt.libvirtError:
            return None


def _may_still_happen(error: libvirt.libvirtError) -> bool:
    """
    Whether the agent may have been asked, or still be: also by a libvirtd that we have lost.

    Not where libvirt says that others kept the agent busy: it was not asked, and who froze the guest is to thaw it.
    """
    return error.get_error_domain() == libvirt.VIR_FROM_RPC or error.get_error_code() in (
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED, AGENT_COMMAND_TIMEOUT
    )
