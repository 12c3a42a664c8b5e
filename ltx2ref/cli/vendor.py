"""`ltx2ref vendor`: a copy of this package in another project."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .command import DONE, WRONG, add_command
from .output import print_json

if TYPE_CHECKING:
    from ..vendor import Copy

VENDOR_EXAMPLES = """examples:
  ltx2ref vendor myproject --as ltx2_reference
      to myproject/ltx2_reference; an unchanged copy there is replaced
  ltx2ref vendor myproject --as ltx2_model --model
      the architecture's files, which need nothing but torch and einops
  ltx2ref vendor myproject --as ltx2_reference --check
      what was changed there since, and what is newer here

exit status:
  0  copied, or with --check the same as here
  1  with --check: changed there, or outdated
  2  unusable input"""


def add_vendor(commands: Any) -> None:
    command = add_command(
        commands, "vendor", run_vendor, "Copy this package, or the model alone, into another project.", VENDOR_EXAMPLES
    )
    command.add_argument("parent", metavar="DIR", help="the folder in which the copy is to stand")
    command.add_argument(
        "--as", dest="name", required=True, metavar="NAME", help="the copy's name, as in `import NAME`"
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument("--model", action="store_true", help="the model alone, without checkpoints, verify or audit")
    action.add_argument("--check", action="store_true", help="compare only")


def run_vendor(options: argparse.Namespace) -> int:
    """Make a copy, or check one."""
    from ..vendor import check, vendor

    target = Path(options.parent) / options.name
    copy = check(target) if options.check else vendor(options.parent, options.name, model_only=options.model)
    if options.json:
        print_json(asdict(copy))
    else:
        print_copy(copy)
    return DONE if copy.current else WRONG


def print_copy(copy: "Copy") -> None:
    from ..vendor import some

    origin = f"ltx2ref {copy.version}{f', commit {copy.commit}' if copy.commit else ''}"
    print(f"{copy.folder}: {'the model' if copy.model_only else 'all'} of {origin}; {copy.files} files")
    if copy.changed:
        print(f"changed there: {some(copy.changed)}")
    if copy.outdated:
        print(f"another version here, {__version__}, differs in: {some(copy.outdated)}")
    if copy.current:
        print(f"unchanged, and the same as version {__version__} here")
