"""Copies of this package, or of the model alone, in other projects: made, patched, replaced and compared with it.

A copy may have any name and lie in any package, for all imports here are relative. It comes with the licence and with
a record of its version and of every file's SHA-256, by which changes made there are told from changes made here.
"""

from .copies import Copy as Copy
from .copies import check_copy as check_copy
from .copies import save_patch as save_patch
from .copies import update_copy as update_copy
from .copies import vendor as vendor
