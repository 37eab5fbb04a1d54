# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's own tools: what qemu-img says of images, and qemu-nbd that reads or writes them."""
