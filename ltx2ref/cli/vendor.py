"""`ltx2ref vendor`: copy this package into other projects."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .command import DONE, WRONG, add_command
from .output import print_json, print_text

VENDOR_EXAMPLES = """examples:
  ltx2ref vendor myproject --as ltx2_reference
      to myproject/ltx2_reference
  ltx2ref vendor myproject --as ltx2_model --model
      the model and its self-test, which need nothing but torch and einops
  ltx2ref vendor myproject --as ltx2_model --check
      what has changed there, and whether there is a newer version
  ltx2ref vendor myproject --as ltx2_model --save-patch why
      the changes made there, as patches/NUMBER-why.patch
  ltx2ref vendor myproject --as ltx2_model --update
      this version, with the patches applied again

exit status:
  0  written, or with --check unchanged
  1  with --check: changed there, or outdated
  2  unusable input, or a patch that does not fit: nothing is written"""


def add_vendor(commands: Any) -> None:
    """Add `vendor` to the commands."""
    command = add_command(
        commands, "vendor", run_vendor, "Copy this package, or the model alone, into another project.", VENDOR_EXAMPLES
    )
    command.add_argument("parent", metavar="DIR", help="the folder in which to put the copy")
    command.add_argument(
        "--as", dest="name", required=True, metavar="NAME", help="the copy's name, as in `import NAME`"
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument("--model", action="store_true", help="the model alone, without checkpoints, verify or audit")
    action.add_argument("--check", action="store_true", help="compare only")
    action.add_argument("--update", action="store_true", help="replace the copy, and apply its patches again")
    action.add_argument("--save-patch", metavar="WHY", help="keep what was changed in the copy as its next patch")
    command.add_argument("--parents", action="store_true", help="make DIR if it is missing")
    command.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    command.add_argument(
        "--ask-index", action="store_true", help="with --check: also ask pip's package index for a newer release"
    )


def run_vendor(options: argparse.Namespace) -> int:
    """Make, check, update or patch a copy, and print what was done or found."""
    from ..vendor import check_copy, save_patch, update_copy, vendor
    from ..vendor.report import copy_report, written_report

    target, dry_run = Path(options.parent) / options.name, options.dry_run
    if options.check:
        copy = check_copy(target, ask_index=options.ask_index)
        if options.json:
            print_json(asdict(copy))
        else:
            print_text("\n".join(copy_report(copy, options.ask_index)))
        return DONE if copy.current else WRONG
    if options.update:
        written = update_copy(target, dry_run=dry_run)
    elif options.save_patch is not None:
        written = save_patch(target, options.save_patch, dry_run=dry_run)
    else:
        written = vendor(
            options.parent, options.name, model_only=options.model, parents=options.parents, dry_run=dry_run
        )
    if options.json:
        print_json(asdict(written) | {"dry_run": dry_run})
    else:
        print_text("\n".join(written_report(written, dry_run)))
    return DONE
