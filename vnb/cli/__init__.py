# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands, a module each, and what they share: arguments, usage texts, progress, exit statuses."""
