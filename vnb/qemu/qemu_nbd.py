# SPDX-License-Identifier: LGPL-2.1-or-later
"""qemu-nbd with an image, on a listening socket that it is handed."""

from __future__ import annotations

import signal

from vnb.base.processes import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence


class QemuNbd(Child):
    """
    path: of the image. format_: its format. options: of qemu-nbd. patient: it has something to write when it ends.

    libnbd can start a server by itself, and this is not used, for four reasons. It ends the server by SIGTERM, which
    qemu-nbd forgets if it comes while it starts (QEMU 7.2): the image would stay locked. A server outlives us if we are
    killed. What the server says goes to our standard error, and is not there to explain its end. And one handle gets
    one server: several connections to one image are not possible.
    """

    def __init__(
        self, path: str, format_: str, options: Sequence[str], listener: socket.socket, patient: bool = False,
        environment: Mapping[str, str] | None = None, directory: str | None = None, debug: bool = False,
    ) -> None:
        super().__init__(
            ["qemu-nbd", *options, f"--format={format_}", "--", path], "qemu-utils", listener=listener,
            environment=environment, directory=directory, debug=debug,
            ending=signal.SIGTERM if patient else signal.SIGKILL,
        )
