"""Print how dense Python files are: how much there is to take in on a line, and how long the functions are.

A limit on lines is easily kept by writing two ideas on one line. These numbers show it when that happens. Each row of
the table is one set of files:

    tokens per line     names (keywords included), operators, brackets, numbers and strings, over the lines that have
                        any; a docstring is no token, and an f-string is one
    tuple assignments   the share of plain assignments (no annotation, no `+=`) that unpack into a tuple of targets
    median, longest     lines of a function or method, from `def` to its end, docstring and comments included
    forward             the largest number of arguments of a method called `forward`, `self` not counted
    lines               all lines of the files
"""

import argparse
import ast
import io
import statistics
import sys
import token
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ltx2ref"
CORE = ("sizes", "rope", "embeddings", "modulation", "attention", "block", "model")
SETS = {"core": CORE, "rope to model": CORE[1:], "interface": ("interface",)}
DIFFUSERS = "models/transformers/transformer_ltx2.py"
COUNTED = {token.NAME, token.OP, token.NUMBER, token.STRING}
# From Python 3.12 on an f-string is many tokens, from 3.14 on a t-string, too:
OPENS, CLOSES = (
    {getattr(token, f"{kind}STRING_{end}") for kind in "FT" if hasattr(token, f"{kind}STRING_{end}")}
    for end in ("START", "END")
)

EXAMPLES = """examples:
  python scripts/density.py                                  this project's model, and diffusers' if it is installed
  python scripts/density.py ltx2ref/parity scripts/bench.py  a package and a file
  python scripts/density.py DiT=../DiT/models.py gpt-oss=../gpt-oss/gpt_oss/torch/model.py \\
      FLUX.2=../flux2/src/flux2/model.py nanochat=../nanochat/nanochat/gpt.py
  python scripts/density.py old=ltx2ref/rope.py,ltx2ref/block.py   several files in one row
"""


@dataclass(frozen=True)
class Density:
    """Hold the counts of one set of files."""

    lines: int
    tokens: int
    lines_with_tokens: int
    assignments: int
    tuple_assignments: int
    functions: tuple[int, ...]  # the lines of each
    forward_arguments: int  # the largest number; 0 without a `forward`

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / max(self.lines_with_tokens, 1)

    @property
    def tuple_share(self) -> float:
        return self.tuple_assignments / max(self.assignments, 1)

    @property
    def median_function(self) -> float:
        return statistics.median(self.functions or (0,))

    @property
    def longest_function(self) -> int:
        return max(self.functions, default=0)


def measure(paths: Iterable[str | Path]) -> Density:
    """Count over Python files, and over all Python files of folders, as one set.

    Raises `ValueError` for a path that does not exist, for one without Python files, and for one that is no Python.
    """
    sources = [read(file) for path in paths for file in python_files(Path(path))]
    nodes = [node for _, tree in sources for node in ast.walk(tree)]
    tokens = [list(lines_of_tokens(source, tree)) for source, tree in sources]
    plain = [node for node in nodes if isinstance(node, ast.Assign)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return Density(
        lines=sum(len(source.splitlines()) for source, _ in sources),
        tokens=sum(map(len, tokens)),
        lines_with_tokens=sum(len({*lines}) for lines in tokens),
        assignments=len(plain),
        tuple_assignments=sum(any(isinstance(target, ast.Tuple) for target in node.targets) for node in plain),
        functions=tuple((node.end_lineno or node.lineno) - node.lineno + 1 for node in functions),
        forward_arguments=max((arguments(node) for node in functions if node.name == "forward"), default=0),
    )


def python_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: expected a Python file, or a folder that has some")
    return files


def read(file: Path) -> tuple[str, ast.Module]:
    try:
        source = file.read_text(encoding="utf-8")
        return source, ast.parse(source)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected Python, got {error}") from None


def lines_of_tokens(source: str, tree: ast.Module) -> Iterator[int]:
    """Yield the line on which each counted token begins."""
    docstrings = {(node.lineno, node.col_offset) for node in docstrings_of(tree)}
    inside = 0  # the number of f-strings around a token: they nest
    for part in tokenize.generate_tokens(io.StringIO(source).readline):
        inside -= part.type in CLOSES
        opens = part.type in OPENS
        if not inside and (opens or part.type in COUNTED) and part.start not in docstrings:
            yield part.start[0]
        inside += opens


def docstrings_of(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body[:1]:
                case [ast.Expr(value=ast.Constant(value=str()) as docstring)]:
                    yield docstring


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(argument is not None and argument.arg != "self" for argument in every)


def default_sets() -> dict[str, list[Path]]:
    """Return this project's sets of files, and diffusers' model if diffusers is installed."""
    sets = {name: [PACKAGE / f"{file}.py" for file in files] for name, files in SETS.items()}
    sets = {name: files for name, files in sets.items() if all(file.exists() for file in files)}
    if spec := find_spec("diffusers"):
        sets["diffusers"] = [Path(spec.origin or "").parent / DIFFUSERS]
    return sets


def named_set(argument: str) -> tuple[str, list[Path]]:
    name, _, paths = argument.rpartition("=")
    return name or paths, [Path(path) for path in paths.split(",")]


def table(sets: dict[str, Density]) -> str:
    """Return the counts as a Markdown table, one row for each set."""
    rows = [
        "| | tokens per line | tuple assignments | median function | longest | forward | lines |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, x in sets.items():
        rows.append(
            f"| {name} | {x.tokens_per_line:.1f} | {x.tuple_share:.0%} | {x.median_function:g} | {x.longest_function} "
            f"| {x.forward_arguments} | {x.lines} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", metavar="[NAME=]PATH[,PATH...]", help="files or folders, one row each")
    args = parser.parse_args(arguments)
    sets = dict(map(named_set, args.sets)) or default_sets()
    try:
        print(table({name: measure(paths) for name, paths in sets.items()}))
    except ValueError as error:
        print(f"density.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
