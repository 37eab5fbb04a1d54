# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stream: frames, heads, segments, their index, compression; formats/extent-stream.md has its rules."""
