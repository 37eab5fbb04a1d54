# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages stay readable: no long sentence, no clause as a subject, no word that the glossary tells us to avoid."""

import prose
import pytest


@pytest.mark.parametrize("page", prose.pages(), ids=lambda path: str(path.relative_to(prose.ROOT)))
def test_page_is_plain(page):
    assert list(prose.findings(page)) == []


@pytest.mark.parametrize("sentence, reason", [
    ("Who has it knows.", "a clause is the subject"), ("The reason is said in a line.", "say who says this"),
    ("The set is a repository.", '"repository" is not a word of the glossary'), (f"{'word ' * 33}.", "33 words"),
    ("The keeper ends the job, since nobody else does.", None), ("A block device has a size.", None),
])
def test_findings(tmp_path, sentence, reason):
    """Each kind of finding is found, and plain sentences are left alone."""
    page = tmp_path / "page.md"
    page.write_text(f"{sentence.replace(' .', '.')}\n")
    assert [found for found, _ in prose.findings(page)] == ([] if reason is None else [reason])
