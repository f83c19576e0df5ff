"""docs/troubleshooting.md beside the code: each error that a user can see is on that page."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ERRORS = {"UserError", "Undecodable", "Damaged", "exit"}
VALIDATORS = {"params.py", "schema.py", "search.py", "sources.py", "archives.py"}  # whose ValueErrors users see
OTHERS_WORDS = {  # of errors that pass on what others said, or another function: file and what the message is made of
    ("src/finetune/checkpoint.py", "refused"),  # on the page, too
    ("src/finetune/datasets.py", "' '.join([f'{source} has {listing(sorted(odd))} {problem}.', *hints]) + f'\\n{LAYOUT}'"),  # noqa: E501
    ("src/finetune/schema.py", "'\\n'.join((f'{path}: {_explain(each, keys(kind))}' for each in error.errors()))"),
    ("src/finetune/search.py", "'\\n'.join(wrong)"),
    ("src/finetune/search.py", "f\"{' '.join(changes)}: {error}\""),
    ("src/finetune/sharing.py", "problem"),
    ("src/summarize.py", "nothing_found(finished, metrics)"),
    ("src/checkpoints.py", "f\"{many}.{(nearest(start, [run.name for run in stored]) if not found else ' Give more digits.')}\""),  # noqa: E501
    ("src/compare.py", "f'{experiment.name}: {error}'"),
}  # fmt: skip
ENDINGS = {"128 + number", "128 + error.sigval", "failure.exitcode", "result.returncode"}
ENDINGS |= {"f'error: {error}'", "f'error: {known}'"}


def text(node: ast.AST) -> str:
    """Return the text of an expression that makes a message, with … for what is not written there."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    return "…"


def raised() -> list[tuple[str, ast.AST]]:
    """Return the file and the message of each error that a user can see."""
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = ast.unparse(node.func).rpartition(".")[2]
                if name in ERRORS or (name == "ValueError" and file.name in VALIDATORS):
                    found.append((file.relative_to(ROOT).as_posix(), node.args[0]))
    return found


def piece(message: ast.AST) -> str:
    """Return the longest piece of a message's first line that is written in the code; of all where that has little."""
    first, *more = ([each.strip() for each in line.split("…")] for line in text(message).split("\n"))
    longest = max(first, key=len)
    return longest if len(longest) > 5 else max((each for line in more for each in line), key=len, default="")


def test_each_error_is_on_the_page():
    page = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
    others = OTHERS_WORDS | {(file, ending) for file, _ in raised() for ending in ENDINGS}
    errors = [(file, piece(message)) for file, message in raised() if (file, ast.unparse(message)) not in others]
    assert len(errors) > 100
    assert [(file, said) for file, said in errors if not said or said not in page] == []


def test_what_passes_on_anothers_words_is_still_there():
    there = {(file, ast.unparse(message)) for file, message in raised()}
    gone = {each for each in OTHERS_WORDS - there if (ROOT / each[0]).exists()}
    assert gone == set()
