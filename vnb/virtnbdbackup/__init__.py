# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of virtnbdbackup, as segments of ours."""
