# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The sentences of pages, and what is hard to read in them.

`prose.py [PAGE]...` prints the findings in these pages, or in all of them, and a line of figures for each page.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "man" / "vnb-glossary.7"
MAX_WORDS = 32  # of one sentence; the rule is 25, and a sentence with a list in it may need some more

# A subject that is a clause, and verbs without anybody who acts, are what readers stumble over.
HARD = {
    re.compile(r"^(?:What|Who|Whoever|Whatever|Whose)\b(?!.*\?$)"): "a clause is the subject",
    re.compile(r"[;:,] (?:what|who|whoever|whatever) (?:is|has|was|are|goes|comes)\b"): "a clause is the subject",
    re.compile(r"\b(?:is|are|was|so) (?:said|told)\b"): "say who says this",
    re.compile(r"^(?:With|Without|Of|For|From|In) it[:,]"): '"it" has no noun near it',
    re.compile(r"\bas far as (?:is|was) known\b"): "say who knows",
}

# Lines of mdoc that take part in no sentence.
_NO_TEXT = {
    "Dd", "Dt", "Os", "Nd", "It", "Bl", "El", "Bd", "Ed", "Sh", "Ss", "Op", "Oo", "Oc", "An", "Fo", "Fc", "Bk", "Ek",
}
_ENDS = {"Pp", "It", "Sh", "Ss", "Bl", "El", "Bd", "Ed", "D1", "Dl"}
_MACROS = {
    "Nm", "Xr", "Fl", "Ar", "Cm", "Ic", "Ev", "Pa", "Ql", "Dq", "Sq", "Pq", "Em", "Sy", "Li", "Sx", "Dv", "Va", "Er",
    "Ns", "Bq", "Brq", "Qq", "Lk", "Tn", "No",
}


def of_page(text):
    """Yield the paragraphs (str) of a page in mdoc, without its synopsis, tables and literal parts."""
    kept, literal, section = [], False, ""
    for line in text.splitlines():
        words = line[1:].split() if line.startswith(".") else []
        macro = words[0] if words else ""
        if macro == "Bd":
            literal = True
        if macro == "Sh":
            section = " ".join(words[1:])
        if macro in _ENDS and kept:
            yield "\n".join(kept)
            kept = []
        if macro == "Ed":
            literal = False
        if literal or section in ("SYNOPSIS", "SEE ALSO", "AUTHORS", "COPYRIGHT", "NAME"):
            continue
        if line.startswith('.\\"') or macro in _NO_TEXT or macro in _ENDS:
            continue
        if macro:
            kept.append(_without_macros(words))
        elif line:
            kept.append(line)
    if kept:
        yield "\n".join(kept)


def _without_macros(words):
    text = " ".join(word for word in words if word not in _MACROS)
    if words[0] == "Nm" and len(words) == 1:
        text = "vnb"
    text = re.sub(r"(?<!\S)-?-([a-z])", r"--\1", text) if "Fl" in words else text
    return re.sub(r" ([.,:;)])(?= |$)", r"\1", text)


def of_markdown(text):
    """Yield the paragraphs (str) of a page in Markdown, without its tables and code."""
    text = re.sub(r"(?ms)^```.*?^```\n|<!--.*?-->", "", text)
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not re.match(r"    |\||#", line)]
        for part in re.split(r"(?m)^[-*] ", "\n".join(lines)):
            if part.strip():
                yield re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(part.split()))


def sentences(paragraph):
    """The sentences (list of str) of a paragraph."""
    plain = re.sub(r"\\(?:&|e)", "", paragraph)
    # In mdoc every sentence begins on a line of its own, and may begin with the name of a command.
    parts = re.split(r"(?<=[.!?])\)?(?: +(?=[A-Z\"`(])| *\n)", plain)
    return [" ".join(part.split()) for part in parts if part.strip()]


def paragraphs(path):
    """The paragraphs of a page (Path), by the kind of its file."""
    text = path.read_text(encoding="utf-8")
    return list(of_markdown(text) if path.suffix == ".md" else of_page(text))


def avoided():
    """The words (list of str) that the glossary tells us not to use."""
    found = []
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        if line.startswith("Not: "):
            found += line[len("Not: "):].rstrip(".").split(", ")
    return found


def findings(path):
    """Yield (reason, sentence) of what is hard to read in a page."""
    words = re.compile(rf"\b({'|'.join(map(re.escape, avoided()))})s?\b", re.IGNORECASE)
    for paragraph in paragraphs(path):
        for sentence in sentences(paragraph):
            count = len(sentence.split())
            if count > MAX_WORDS:
                yield f"{count} words", sentence
            for pattern, reason in HARD.items():
                if pattern.search(sentence):
                    yield reason, sentence
            found = words.search(re.sub(r"`[^`]*`|\bblock devices?\b|\binternal snapshots?\b", "", sentence))
            if found and path != GLOSSARY:
                yield f'"{found[0]}" is not a word of the glossary', sentence


# Functions and exceptions whose text a user reads.
_SAY = {
    "Error", "StreamError", "UsageError", "Mistyped", "Saved", "Followed", "FrameError", "BelowThreshold",
    "NotInstalled", "Unready", "Unanswered", "KeeperDied", "note", "warn", "warned", "say", "detail", "error", "fault",
    "failure",
}
# In messages, these words are of the code: a user knows restore points, bases, domains.
_OF_CODE = re.compile(
    r"(?<!restore )(?<!mount )(?<!-)\bpoints?\b(?! to| outside)|(?<!-)\bparents?\b|\bmachines?\b", re.IGNORECASE
)
# Of a type of file, and of the options and fields that are called so.
_ALLOWED = re.compile(r"\bblock devices?\b|--\S+|\bmalformed head: .*", re.IGNORECASE)


def messages(path):
    """Yield the texts (str) that a module (Path) says to a user, with X for what it fills in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            yield from (text for text in map(_text, node.args) if name in _SAY and text and " " in text)


def _text(node):
    """The text of a literal, as far as it is one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (_text(node.left) or "") + (_text(node.right) or "")
    if isinstance(node, ast.IfExp):
        return " ".join(filter(None, [_text(node.body), _text(node.orelse)]))
    return None


def findings_in_message(text):
    """Yield what is hard to read in a message."""
    words = re.compile(rf"\b({'|'.join(map(re.escape, avoided()))})s?\b", re.IGNORECASE)
    plain = _ALLOWED.sub("", text)
    for pattern, reason in HARD.items():
        if pattern.search(plain):
            yield reason
    for found in filter(None, (words.search(plain), _OF_CODE.search(plain))):
        yield f'"{found[0]}" is not a word of the glossary'


def pages():
    """All pages (list of Path) that people read."""
    patterns = "man/*.[1-9]", "*.md", "formats/*.md", "tests/*/*.md"
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def main(names):
    total = 0
    for path in map(Path, names) if names else pages():
        path = path.resolve()
        lengths = [len(s.split()) for p in paragraphs(path) for s in sentences(p)] or [0]
        found = list(findings(path))
        for reason, sentence in found:
            print(f"{path.name}: {reason}: {sentence}")
        total += len(found)
        print(f"{path.name}: {len(found)} findings; {sum(lengths)} words, mean {sum(lengths) / len(lengths):.1f}, "
              f"longest {max(lengths)}")
    return total > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
