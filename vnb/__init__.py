# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backup of running virtual machines as a pipeline of filters; see vnb(7)."""

__version__ = "0.1.0"
