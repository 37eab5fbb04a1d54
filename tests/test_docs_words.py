# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages stay readable: no long sentence, no clause as a subject, no word that the glossary tells us to avoid."""

import prose
import pytest

MODULES = sorted((prose.ROOT / "vnb").rglob("*.py"))


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


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(prose.ROOT)))
def test_messages_are_plain(module):
    """In the words of the glossary, as the pages are: else nobody finds in them what a command has said."""
    assert [(text, found) for text in prose.messages(module) for found in prose.findings_in_message(text)] == []


def test_there_are_messages():
    assert sum(len(list(prose.messages(module))) for module in MODULES) > 300


@pytest.mark.parametrize("text, count", [
    ("no disk X at point X", 1), ("no disk X at restore point X", 0), ("is neither a file nor a block device", 0),
    ("the parent of X is missing", 1), ("needs --parent", 0), ("it is said here", 1), ("the ledger is broken", 1),
])
def test_findings_in_messages(text, count):
    assert len(list(prose.findings_in_message(text))) == count
