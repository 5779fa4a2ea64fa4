"""Check cards on the Hugging Face Hub, and upload an export to it.

The address of the Hub is that of `huggingface_hub`: the environment variable ``HF_ENDPOINT``, or
https://huggingface.co. The access token is ``HF_TOKEN``, or the one that `hf auth login` stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, RepoCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client that the installed version uses
    LocalTokenNotFoundError,
)

from rlhf.errors import UserError, first_line


def validate_cards(cards: Sequence[RepoCard]) -> None:
    """Check the metadata of cards with the API of the Hub.

    Raises:
        UserError: The Hub rejects a card, or cannot be reached.
    """
    for card in cards:
        with _hub_errors_as_user_errors(f"the {card.repo_type} card cannot be checked"):
            try:
                card.validate()
            except ValueError as error:
                raise UserError(
                    f"the Hugging Face Hub rejects the {card.repo_type} card: {first_line(error)}"
                ) from error


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to a repository on the Hub, which is created if it does not exist.

    Args:
        folder: Folder of the export.
        repository: OWNER/NAME.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        UserError: The Hub cannot be reached, or refuses the token or the upload.
    """
    api = HfApi(library_name="rlhf-kit")
    with _hub_errors_as_user_errors(f"{folder} is exported, but not uploaded to {repository}"):
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload of rlhf export",
            ignore_patterns=[".*"],  # the marker of the export
        )
    return str(url)


@contextlib.contextmanager
def _hub_errors_as_user_errors(what: str) -> Iterator[None]:
    """Return a context manager that raises errors of requests to the Hub as UserError."""
    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{what}: set HF_TOKEN to an access token, or run `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = "; set HF_TOKEN to an access token with write permission" if status == 401 else ""
        raise UserError(f"{what}: {first_line(error)}{hint}") from error
    except HFValidationError as error:
        raise UserError(f"{what}: {first_line(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        reason = first_line(error) or type(error).__name__
        raise UserError(f"{what}: the Hugging Face Hub cannot be reached ({reason})") from error
