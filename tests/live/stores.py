# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stores for backups that are none of ours: an S3 server."""

import os
import re
import subprocess
from pathlib import Path

from lab import ROOT, wait_for

MOTO = ROOT / ".venv" / "bin" / "moto_server"


class S3:
    """
    moto's server, which keeps everything in its memory, with the bucket store.

    env (dict): with it the aws client comes here.
    """

    def __init__(self, lab):
        self.log = Path(lab.path("s3.log"))
        with open(self.log, "wb") as log:  # a port of its choice, which it tells there
            self.server = subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", "0"], stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=log)
        try:
            self.env = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{wait_for(self.port, 'S3 server')}",
                "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            }
            self.aws("mb", "s3://store")
        except BaseException:
            self.close()
            raise

    def port(self):
        assert self.server.poll() is None, self.log.read_text()
        return (re.findall(r"Running on http://127\.0\.0\.1:(\d+)", self.log.read_text()) or [None])[0]

    def aws(self, *arguments):
        """Run aws s3, and return what it printed."""
        argv = ["aws", "--endpoint-url", self.env["AWS_ENDPOINT_URL"], "s3", *arguments]
        return subprocess.run(argv, env={**os.environ, **self.env}, check=True, capture_output=True, text=True).stdout

    def names(self, prefix):
        return [line.split()[-1] for line in self.aws("ls", f"s3://store/{prefix}/").splitlines()]

    def close(self):
        self.server.terminate()
        self.server.wait()
