"""Upload an exported folder to the Hugging Face Hub. Needs the package huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from terminal import first_line


def import_hub() -> ModuleType:
    """The package. Raises ValueError if it is missing, or if there is no account to upload with."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("push_to needs the package huggingface_hub: pip install huggingface_hub."
                         ) from None
    if not huggingface_hub.get_token():
        raise ValueError("push_to needs an account of the Hugging Face Hub: run hf auth login, or "
                         "set HF_TOKEN.")
    return huggingface_hub


def push(folder: Path, name: str) -> str:
    """Upload a folder to the model OWNER/NAME, which is created private; return its address.

    Raises OSError with one sentence if that fails.
    """
    hub = import_hub()
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = hub.HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder,
                          commit_message="Exported by nanohydra")
    except Exception as error:
        # Errors of the connection and of the server have no common class.
        reason = first_line(error)
        raise OSError(f"push_to={name} failed ({reason[:300]}). {folder} is complete: upload it "
                      f"later with hf upload {name} {folder}") from None
    return str(address)
