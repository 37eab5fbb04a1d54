# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD clients: what is data, zero and dirty, connections within a budget, and disks that are written."""
