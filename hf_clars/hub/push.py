"""A finished run to the Hub, in one commit: it is there completely or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_clars.hub.card_text import REPO_PLACEHOLDER
from hf_clars.hub.errors import HubError
from hf_clars.hub.model_card import check_hub_id
from hf_clars.hub.run_files import CARD, SharedFile, shared_files


@dataclass(frozen=True)
class Push:
    """What was pushed, or would be.

    Attributes:
        repo_id: "owner/name".
        files: All files of the commit.
        commit: As huggingface_hub describes it (a string: its address); None after a dry run.
    """

    repo_id: str
    files: Sequence[SharedFile]
    commit: CommitInfo | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        rows = [(file.name, readable_size(file.size)) for file in self.files]
        rows.append((f"{len(rows)} files", readable_size(self.size)))
        return "\n".join(f"{size:>10}  {name}" for name, size in rows)


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload a model trained with hf_clars",
    token: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Push a finished run to the Hub.

    The repository is made if there is none; other files that it holds stay. The commit comes after all uploads: when
    the connection is lost before, the repository is as it was, and a second push sends only what is missing. In the
    pushed card the code that loads the model names the repository; the card on disk stays as it is.

    Args:
        folder: The run's folder; see `shared_files` for what is taken from it.
        repo_id: "owner/name"; a name alone goes to the token's owner.
        private: Whether a new repository is private. Default None: as the owner's settings say.
        revision: Branch to commit to, made if there is none. Default None: the main branch.
        message: Title of the commit.
        token: Default None: `HF_TOKEN`, or that of `hf auth login`.
        dry_run: Only say what would be pushed; needs neither token nor network.

    Returns:
        The files and, unless `dry_run`, the commit's address.

    Raises:
        HubError: The folder is no finished run, the id is none, the Hub refused, or the connection was lost.
    """
    check_hub_id("repo_id", repo_id)
    files = [_for_repository(file, repo_id) for file in shared_files(folder)]
    if dry_run:
        return Push(repo_id, files)
    api = HfApi(token=token, library_name="hf_clars")
    with explained(repo_id, api.endpoint):
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files = [_for_repository(file, full_id) for file in shared_files(folder)]
        if revision is not None:
            api.create_branch(full_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            full_id,
            [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in files],
            commit_message=message,
            revision=revision,
        )
    return Push(full_id, files, commit)


def readable_size(size: int) -> str:
    """Bytes with a unit, as "97.8 MB" (1 MB is 1,000,000 bytes, as the Hub counts)."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _for_repository(file: SharedFile, repo_id: str) -> SharedFile:
    """The card with the repository's id where it shows how to load; other files as they are."""
    if file.name != CARD:
        return file
    assert isinstance(file.content, Path)
    try:
        text = file.content.read_text(encoding="utf-8")
        ModelCard(text)
    except Exception as error:  # YAML's errors and the Hub's own have no common base
        raise HubError(
            f"The metadata of {file.content} cannot be read, and the Hub would refuse them: {error}. Mend the lines "
            "between the two ---, or write the card again with `hf-clars card`."
        ) from error
    content = text.replace(REPO_PLACEHOLDER, f'"{repo_id}"').encode()
    return replace(file, content=content, size=len(content))


@contextmanager
def explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises inside into one paragraph that says what to do.

    Args:
        repo_id: The repository that is changed.
        endpoint: The Hub's address.

    Raises:
        HubError: In place of the client's error.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client's HTTP library, and with it the errors' base, differs between versions
        raise HubError(_paragraph(error, repo_id, endpoint)) from error


def _paragraph(error: Exception, repo_id: str, endpoint: str) -> str:
    refused = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    status = refused.response.status_code if refused is not None and refused.response is not None else None
    reason = " ".join(str(list(_causes(error))[-1]).split())
    if status == 401:
        return (
            f"{endpoint} does not know the token, so {repo_id} was not changed. Log in with `hf auth login` or set "
            "HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)."
        )
    if status == 403:
        return (
            f"The token may not write to {repo_id} on {endpoint}. Use a token with write access to that owner's "
            "repositories, or another --repo-id."
        )
    if status is not None and status < 500:
        return f"{endpoint} refused {repo_id} with status {status}: {reason}. Nothing was committed."
    if isinstance(error, OfflineModeIsEnabled):
        return f"Nothing can be pushed to {repo_id} while HF_HUB_OFFLINE is set: unset it, and run the command again."
    if status is None and not any(_is_connection_error(cause) for cause in _causes(error)):
        return f"{repo_id} cannot be pushed ({type(error).__name__}): {reason}. Nothing was committed."
    return (
        f"The connection to {endpoint} failed before the commit ({reason or type(error).__name__}), so {repo_id} is as "
        "it was. Run the same command again: files that arrived are not sent twice. A server without Xet storage "
        "needs HF_HUB_DISABLE_XET=1."
    )


def _is_connection_error(error: BaseException) -> bool:
    # By name, because the client's HTTP library is another one in other versions.
    local = isinstance(error, OSError) and error.filename is not None
    return (isinstance(error, OSError) and not local) or any(
        kind.__name__ == "TransportError" for kind in type(error).__mro__
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
