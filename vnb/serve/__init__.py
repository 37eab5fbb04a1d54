# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vnb-map serves: restore points as block devices, by nbdkit, qemu-nbd and nbdfuse."""
