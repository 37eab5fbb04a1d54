# SPDX-License-Identifier: LGPL-2.1-or-later
"""
An NBD server that answers as the protocol has it, but for some of its words: https://github.com/NetworkBlockDevice/nbd

    with Liar(size, lie) as server:
        ... server.uri

lie: function (name, bytes) -> bytes, called for each message that is sent. One client at a time.
"""

import contextlib
import socket
import struct
import tempfile
import threading

OPTION_MAGIC, OPTION_REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
REQUEST_MAGIC, CHUNK_MAGIC = 0x25609513, 0x668E33EF
OPT_ABORT, OPT_INFO, OPT_GO, OPT_STRUCTURED, OPT_LIST_CONTEXT, OPT_SET_CONTEXT = 2, 6, 7, 8, 9, 10
ACK, INFO, CONTEXT, UNSUPPORTED = 1, 3, 4, 0x80000001
READ, DISCONNECT, BLOCK_STATUS = 0, 2, 7
DATA_CHUNK, STATUS_CHUNK, DONE = 1, 5, 1
FLAGS = 0x1 | 0x2 | 0x100  # has flags, read-only, multi-conn
PATIENCE = 0.3  # seconds that it waits for a client that waits for it


class Liar:
    """See above. uri (str)."""

    def __init__(self, size, lie):
        self.size = size
        self.lie = lie

    def __enter__(self):
        self._directory = tempfile.TemporaryDirectory(prefix="vnb-test.")
        path = f"{self._directory.name}/s"
        self.uri = f"nbd+unix:///vda?socket={path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._directory.cleanup()

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # that is how it ends
            with client, contextlib.suppress(OSError, EOFError, struct.error):
                client.settimeout(PATIENCE)
                self._client = client
                if self._negotiate():
                    self._transmit()

    def _send(self, name, message):
        self._client.sendall(self.lie(name, message))

    def _receive(self, size):
        found = b""
        while len(found) < size:
            part = self._client.recv(min(size - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return found

    def _negotiate(self):
        self._send("greeting", b"NBDMAGIC" + OPTION_MAGIC + struct.pack(">H", 3))
        self._receive(4)
        while True:
            option, length = struct.unpack(">8xII", self._receive(16))
            data = self._receive(length)

            def reply(name, kind, payload=b"", option=option):
                header = struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(payload))
                self._send(name, header + payload)

            if option in (OPT_GO, OPT_INFO):
                reply("export", INFO, struct.pack(">HQH", 0, self.size, FLAGS))
                reply("block size", INFO, struct.pack(">HIII", 3, 1, 4096, 1 << 25))
                reply("go", ACK)
                if option == OPT_GO:
                    return True
            elif option in (OPT_SET_CONTEXT, OPT_LIST_CONTEXT):
                at = 4 + struct.unpack(">I", data[:4])[0] + 4
                reply("context", CONTEXT, struct.pack(">I", 5) + data[at + 4 :])
                reply("contexts", ACK)
            elif option == OPT_STRUCTURED:
                reply("structured", ACK)
            else:
                reply("option", ACK if option == OPT_ABORT else UNSUPPORTED)
                if option == OPT_ABORT:
                    return False

    def _transmit(self):
        while True:
            kind, cookie, offset, length = self._request()
            if kind == DISCONNECT:
                return
            if kind == READ:
                self._send("data", struct.pack(">IHHQI", CHUNK_MAGIC, DONE, DATA_CHUNK, cookie, 8 + length)
                           + struct.pack(">Q", offset) + b"\1" * length)
            elif kind == BLOCK_STATUS:
                first = min(length, 4096)
                extents = struct.pack(">II", first, 0)
                if length > first:
                    extents += struct.pack(">II", length - first, 3)
                self._send("extents", struct.pack(">IHHQI", CHUNK_MAGIC, DONE, STATUS_CHUNK, cookie, 4 + len(extents))
                           + struct.pack(">I", 5) + extents)

    def _request(self):
        magic, _flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self._receive(28))
        if magic != REQUEST_MAGIC:
            raise EOFError
        return kind, cookie, offset, length
