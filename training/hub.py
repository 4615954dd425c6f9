"""Where a model lies: a folder on this machine, or a repository on the Hub and its local copy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from .checkpoint_files import CONFIG, missing_folder
from .errors import UserError, reason

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# What a folder from the Hub is loaded from; its modeling code is not, the installed one is used.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def local_folder(path_or_id: str) -> Path:
    """The folder itself, or the local copy of a Hub repository, downloaded when it is not there yet."""
    if not is_hub_id(path_or_id):
        return Path(path_or_id).expanduser()
    from huggingface_hub import snapshot_download

    with hub_errors(path_or_id):
        return Path(snapshot_download(path_or_id, allow_patterns=_HUB_FILES))


def is_hub_id(path_or_id: str) -> bool:
    """Whether it names a repository on the Hub, being no folder here.

    Raises:
        UserError: it is neither.
    """
    try:
        path = Path(path_or_id).expanduser()
        if path.is_dir():
            return False
        if path.exists():
            raise UserError(f"{path} is a file; give the folder that holds {CONFIG} and the weights")
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, of no user's home, with a zero byte
        raise UserError(f"{path_or_id!r} is no path of a folder: {reason(error)}") from error
    # `runs/pretrian` is a Hub id by its form; where a folder `runs` exists it is a slip in a path.
    if path.parent.is_dir() or not _HUB_ID.fullmatch(str(path_or_id)):
        raise UserError(missing_folder(path))
    return True


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what can go wrong between this machine and the Hub into one line each."""
    from huggingface_hub import constants

    hub = constants.ENDPOINT
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{hub} needs a token: run `hf auth login` or set HF_TOKEN") from error
    except GatedRepoError as error:
        raise UserError(f"{repo_id} is gated: ask for access at {hub}/{repo_id}, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no repository {repo_id} on {hub} that you may see: check the name; if it is private, run `hf auth login` "
            "or set HF_TOKEN to a token that may read it"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"{hub} refuses the token for {repo_id} (HTTP {status}): run `hf auth login` or set HF_TOKEN to a "
                "token with the rights this needs"
            ) from error
        raise UserError(f"{hub} answers HTTP {status} for {repo_id}: {reason(error)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"cannot reach {hub}, and {repo_id} is not in the local cache: check the network") from error
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name: {reason(error)}") from error
    except Exception as error:
        # By name: the HTTP library under huggingface_hub (httpx, httpx2) differs between its versions.
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            raise UserError(f"cannot reach {hub} ({reason(error)}): check the network") from error
        raise
