"""Repositories on the Hugging Face hub, fetched as local folders by the huggingface_hub library (extra `hub`)."""

import re
from pathlib import Path

from .storage import CheckpointError, as_path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*{}.safetensors", "*{}-*.safetensors")  # all that is fetched: never pickles, never code


def local_folder(
    path: str | Path,
    subfolder: str,
    variant: str | None,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    """Return a local path unchanged, or the folder of a snapshot of the hub repository "owner/name".

    Of a repository only `subfolder` is fetched, and of its weights only the variant's, if there is one. Raises
    `CheckpointError` if the path is neither, or cannot be fetched.
    """
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(path, [f"subfolder = {subfolder!r}: expected a folder inside"])
    if as_path(path).exists():
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
    names = [name.format(f".{variant}" if variant else "") for name in FILES]
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
    try:
        folder = snapshot_download(
            str(path),
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:  # includes unknown, gated and uncached repositories
        raise CheckpointError(path, [f"cannot be fetched from the hub: {type(error).__name__}: {error}"]) from None
    return Path(folder) / subfolder
