# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup job: what it takes, the sources it takes it from, the keeper that watches over it, its record."""
