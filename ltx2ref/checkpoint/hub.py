"""Repositories on the Hugging Face hub as local folders, by the huggingface_hub library (extra `hub`)."""

import re
from pathlib import Path

from .storage import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.safetensors")  # of the subfolder: never pickles, never code


def local_folder(
    path: str | Path, subfolder: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    """A local path as it is, or a snapshot of the repository "owner/name", of which only `subfolder` is fetched.

    Raises `CheckpointError` if it is neither, or cannot be had.
    """
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(path, [f"subfolder = {subfolder!r}: expected a folder inside"])
    if Path(path).exists():
        return Path(path) / subfolder
    if not HUB_ID.fullmatch(str(path)):
        raise CheckpointError(path, ["there is no such file or folder, and it is no id of a hub repository"])
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise CheckpointError(
            path,
            [
                "there is no such file or folder. If it is a repository on the Hugging Face "
                "hub: `pip install 'ltx2ref[hub]'` to fetch it"
            ],
        ) from None
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in FILES]
    try:
        folder = snapshot_download(
            str(path),
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:  # also what the library raises for unknown, gated or uncached ones
        raise CheckpointError(path, [f"not from the hub: {type(error).__name__}: {error}"]) from None
    return Path(folder) / subfolder
