"""The documents as the tests read them: their blocks of commands, and what each command is made of."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MARK = re.compile(r"<!-- (run by|not run:) (.*) -->")
INDENTED = re.compile(r"(?m)^(?P<above>.*)\n(?P<block>(?:    .+\n(?:\n(?=    ))*)+)")
FENCE = re.compile(r"(?ms)^```.*?^```$")


@dataclass(frozen=True)
class Block:
    """An indented block of a document, which is commands."""

    document: str
    line: int  # of the first command, from 1
    lines: list[str]  # as a shell takes them, those that end in a backslash with the next
    run_by: list[str]  # files of tests, from an HTML comment above the block
    why_not: str  # run, likewise

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def text(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str) -> list[Block]:
    """Return a document's blocks of commands, in order."""
    without_fences = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text(name))
    found = []
    for match in INDENTED.finditer(without_fences):
        if match["above"].startswith(("- ", "  ")):  # the next line of a list's item
            continue
        mark = MARK.fullmatch(match["above"])
        kind, said = mark.groups() if mark else ("", "")
        lines = match["block"].replace("\\\n", " ").split("\n")
        run_by = re.findall(r"[\w./-]*/(?:run\b|\w+\.(?:py|yml))", said) if kind == "run by" else []
        at = without_fences[: match.start("block")].count("\n") + 1
        why_not = said if kind == "not run:" else ""
        found.append(Block(name, at, [line.strip() for line in lines if line.strip()], run_by, why_not))
    return found


def block(name: str, line: str) -> Block:
    """Return the block of a document in which a line begins so."""
    (found,) = (each for each in blocks(name) if any(one.startswith(line) for one in each.lines))
    return found


def commands(line: str) -> list[list[str]]:
    """Return the words of each command of a line, the contents of a file for `$(cat FILE)`, without variables."""
    line = re.sub(r"\$\(cat ([\w/]+)\)", lambda match: " ".join(text(match[1]).split()), line)
    words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set(";&|"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [each for each in found if each]


def inline(name: str) -> list[str]:
    """Return the commands that stand in a document's sentences and tables."""
    lines = FENCE.sub("", text(name)).split("\n")
    prose = "\n".join(re.sub(r"^\| [^|]*\|", "", line) if "dvc2" in name else line for line in lines)
    return re.findall(r"(?<!`)`((?:dvc|python|make) [^`]+)`(?!`)", prose)
