# SPDX-License-Identifier: LGPL-2.1-or-later
"""A restore: a stream onto images, devices and NBD servers, and the other files of a domain to their places."""
