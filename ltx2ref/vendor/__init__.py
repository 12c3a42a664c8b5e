"""Copies of this package, or of the model alone, in other projects: making, patching, updating and checking them.

A copy may have any name and be part of any package, because all imports here are relative. It comes with the licence
and with a record of its version and of every file's SHA-256. The record tells changes made in the copy from changes
made here.
"""

from .copies import Copy as Copy
from .copies import check_copy as check_copy
from .copies import save_patch as save_patch
from .copies import update_copy as update_copy
from .copies import vendor as vendor
