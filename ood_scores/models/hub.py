"""Files of the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ood_scores.errors import CheckpointError, UnknownName
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
    owner_and_name, _, revision = repository.partition("@")
    for name in names:
        try:
            return Path(hf_hub_download(owner_and_name, name, revision=revision or None))
        except GatedRepoError as error:
            raise CheckpointError(
                f"{repository} of the Hugging Face hub is gated: accept its terms at "
                f"https://huggingface.co/{owner_and_name}, and log in with: hf auth login."
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise UnknownName(
                f"the Hugging Face hub has no model {owner_and_name!r}: write OWNER/NAME, as on its page."
            ) from error
        except LocalEntryNotFoundError as error:
            raise unreachable(repository, error) from error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise unreachable(repository, error) from error
    raise CheckpointError(f"{repository} of the Hugging Face hub has no {' or '.join(names)}: choose another.")


def unreachable(repository: str, error: Exception) -> CheckpointError:
    """Create the error for a repository that is neither cached nor can be fetched."""
    return CheckpointError(
        f"{repository} is not in the cache of the Hugging Face hub and cannot be fetched ({first_sentence(error)}): "
        f"try again where the hub is reachable, or run hf download {repository} --local-dir DIR there and pass DIR."
    )
