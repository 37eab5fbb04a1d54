# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ground: errors, signals, log, processes, files that last. Nothing of vnb is in here."""
