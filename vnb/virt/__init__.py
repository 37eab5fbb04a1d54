# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt: domains, their XML and their backup jobs. Only this package imports libvirt-python."""
