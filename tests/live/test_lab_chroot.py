# SPDX-License-Identifier: LGPL-2.1-or-later
"""The laboratory where / is no mount point: in the root that debootstrap has made and chroot(8) has entered."""

import os
import subprocess
import sys

import lab as lab_module
import pytest

# A root like this one's in a directory, all of it by bind mounts; then a command in it.
CHROOT = r"""
root=$1/root; mount -t tmpfs none "$1" && mkdir "$root" && cd / || exit
for name in *; do
    if [ -L "$name" ]; then cp -P "$name" "$root"; continue; fi
    if [ -d "$name" ]; then mkdir "$root/$name" && mount --rbind "/$name" "$root/$name" || exit; fi
done
shift; exec chroot "$root" "$@"
"""
ISOLATED = ["unshare", "--mount"]


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode,
    reason="not allowed: a mount namespace",
)
def test_a_chroot_has_a_laboratory_of_its_own(tmp_path, lab):
    """Else it would use, and disturb, the libvirtd of the host, whose sockets may be in the chroot too."""
    own_files = "virsh uri && ls -d /etc/libvirt/pki"  # no libvirtd makes it, the laboratory does
    done = subprocess.run(
        [*ISOLATED, "sh", "-c", CHROOT, "sh", tmp_path, sys.executable, lab_module.__file__, "sh", "-c", own_files],
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["qemu:///system", "/etc/libvirt/pki"]
