# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backup sets: segments in files, the chains that they form, how they are merged and read back."""
