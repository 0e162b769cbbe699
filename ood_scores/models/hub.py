"""Repositories of the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ood_scores.errors import BadInput, CheckpointError, ForeignFile, UnknownName
from ood_scores.models.checkpoints import first_sentence


def hub_file(repository: str, names: tuple[str, ...]) -> Path:
    """Return the path of the first of some files that a repository has, which is downloaded if it is not cached.

    Args:
        repository: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        names: The names of the files.

    Raises:
        UnknownName: if there is no such repository.
        CheckpointError: if it has none of the files, or if they are neither cached nor can be fetched.
    """
    name_of_repository, revision = _parts(repository)
    for name in names:
        try:
            with _fetching(repository):
                return Path(hf_hub_download(name_of_repository, name, revision=revision))
        except EntryNotFoundError:
            continue
    raise CheckpointError(f"{repository} of the Hugging Face hub has no {' or '.join(names)}: choose another.")


def hub_folder(repository: str, patterns: tuple[str, ...]) -> Path:
    """Return a folder with the files of a repository that match some patterns, which are downloaded if not cached.

    Args:
        repository: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        patterns: Names of files; * is a wildcard.

    Raises:
        UnknownName: if there is no such repository.
        CheckpointError: if its files are neither cached nor can be fetched.
    """
    name, revision = _parts(repository)
    with _fetching(repository):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def push_folder(folder: Path, repository: str, *, mark: str, private: bool | None, message: str) -> str:
    """Upload the files of a folder in one commit.

    Args:
        folder: The folder.
        repository: ``OWNER/NAME``, which is created if there is no such repository.
        mark: A file of the folder, without which a repository that has files is not written to.
        private: Whether a new repository is private; None for the owner's default.
        message: The message of the commit.

    Returns:
        The address of the commit.

    Raises:
        BadInput: if the repository cannot be written to.
        ForeignFile: if it has files, but not ``mark``.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        there = {*api.list_repo_files(repository)} - {".gitattributes", "README.md"}
        if there and mark not in there:
            raise ForeignFile(f"{repository} of the Hugging Face hub has other files, but no {mark}: choose another.")
        commit = api.upload_folder(folder_path=folder, repo_id=repository, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise BadInput(
            f"{repository} of the Hugging Face hub cannot be written to ({first_sentence(error)}): write OWNER/NAME of "
            "a repository of yours, and log in with a token that may write: hf auth login."
        ) from error
    return str(commit.commit_url)


def _parts(repository: str) -> tuple[str, str | None]:
    name, _, revision = repository.partition("@")
    return name, revision or None


@contextmanager
def _fetching(repository: str) -> Iterator[None]:
    """Turn the hub's errors into those of this package, but that of a file that a repository does not have."""
    name, _ = _parts(repository)
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} of the Hugging Face hub is gated: accept its terms at https://huggingface.co/{name}, and "
            "log in with: hf auth login."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownName(f"the Hugging Face hub has no model {name!r}: write OWNER/NAME, as on its page.") from error
    except LocalEntryNotFoundError as error:
        raise unreachable(repository, error) from error
    except EntryNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise unreachable(repository, error) from error


def unreachable(repository: str, error: Exception) -> CheckpointError:
    """Create the error for a repository that is neither cached nor can be fetched."""
    return CheckpointError(
        f"{repository} is not in the cache of the Hugging Face hub and cannot be fetched ({first_sentence(error)}): "
        f"try again where the hub is reachable, or run hf download {repository} --local-dir DIR there and pass DIR."
    )
