"""Schedules and calibrations in directories and on the Hugging Face Hub, with model cards of their own facts."""

import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from dpcache.errors import HubError

from .cards import Rows, section, updated_card
from .whole import MAKERS, write_whole

CARD = "README.md"
_REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"


class HubFile(ABC):
    """What `Schedule` and `Calibration` have in common: one file, kept in a directory or a repository of the Hub."""

    #: What is stored, for people, and the name of its file unless another is given.
    KIND: ClassVar[str]
    FILE_NAME: ClassVar[str]

    @abstractmethod
    def save(self, path: "str | os.PathLike[str]") -> None: ...

    @classmethod
    @abstractmethod
    def load(cls, path: "str | os.PathLike[str]") -> Self: ...

    @abstractmethod
    def _card_rows(self) -> Rows:
        """(fact, value, meaning) for the card."""

    @abstractmethod
    def _card_texts(self, arguments: str) -> tuple[str, str]:
        """What the file is, and how to use it, given the arguments of `from_pretrained` as source text."""

    def save_pretrained(
        self, folder: "str | os.PathLike[str]", *, filename: str | None = None, base_model: str | None = None
    ) -> Path:
        """Writes the file into a directory, with a model card (README.md) that `push_to_hub` would write as well.

        A card that is there already keeps all it says but the section about this file.

        Args:
            folder: made if it is not there.
            filename: `schedule.json` or `calibration.safetensors` unless given: for several in one directory.
            base_model: hub id of the model it is for, for the card.

        Returns:
            where the file was written.
        """
        target = Path(folder)
        self._write(target, filename, base_model, heading=target.resolve().name, source=target.resolve().name)
        return target / (filename or self.FILE_NAME)

    @classmethod
    def from_pretrained(
        cls,
        source: "str | os.PathLike[str]",
        *,
        filename: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Reads it from a directory, a file, or a repository on the Hugging Face Hub.

        Args:
            source: the directory or file, or the repository's id, like "user/repo". What is there on disk goes first.
            filename: `schedule.json` or `calibration.safetensors` unless given.
            subfolder: of the directory or repository.
            revision: branch, tag or commit of the repository.
            token: for private repositories; unless given, what `hf auth login` has stored.

        Raises:
            FileNotFoundError: no such file, in a directory.
            HubError: no such repository or file in it; it is gated or private; or the Hub cannot be reached.
            FileFormatError: as `load`.
        """
        name = "/".join(part for part in (subfolder, filename or cls.FILE_NAME) if part)
        return cls.load(_located(source, name, cls.KIND, revision, token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str | None = None,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Puts the file into a repository on the Hugging Face Hub, in one commit with its model card.

        The repository is made if there is none. A card that is there keeps all it says but the section about this file.
        A calibration holds the inputs it was made from, prompts for instance, and publishes them.

        Args:
            repo_id: "user/repo".
            filename: as in `save_pretrained`.
            base_model: as in `save_pretrained`.
            private: whether a new repository is private; the owner's default unless given.
            token: one that may write; unless given, what `hf auth login` has stored.
            revision: branch to commit to, instead of the main one.
            create_pr: propose the commit as a pull request instead.
            commit_message: what the commit says.

        Returns:
            address of the commit, or of the pull request.

        Raises:
            HubError: not allowed, not a repository's id, or the Hub cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token, library_name="dpcache")
        name = filename or self.FILE_NAME
        with explained(repo_id, writing=True), tempfile.TemporaryDirectory() as folder:
            api.create_repo(repo_id, private=private, exist_ok=True)
            card = _remote_card(api, repo_id, revision)
            if card is not None:
                (Path(folder) / CARD).write_text(card, encoding="utf-8")
            self._write(Path(folder), filename, base_model, heading=repo_id, source=repo_id)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(part, Path(folder) / part) for part in (name, CARD)],
                commit_message=commit_message or f"{self.KIND.capitalize()} by dpcache: {name}",
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit.pr_url or commit.commit_url)

    def _write(self, folder: Path, filename: str | None, base_model: str | None, *, heading: str, source: str) -> None:
        name = filename or self.FILE_NAME
        self.save(folder / name)
        arguments = f'"{source}"' if name == self.FILE_NAME else f'"{source}", filename="{name}"'
        title, usage = self._card_texts(arguments)
        text = section(name, title, self._card_rows(), usage)
        path = folder / CARD
        old = path.read_text(encoding="utf-8") if path.exists() else None
        card = updated_card(old, name, text, heading=heading, base_model=base_model)
        write_whole(path, lambda part: part.write_text(card, encoding="utf-8"))


def is_repository_id(text: str) -> bool:
    """Whether it could be a repository's id on the Hub, "user/repo"."""
    return re.fullmatch(_REPOSITORY, text) is not None


def repository_file(text: str, ending: str) -> dict[str, Any] | None:
    """What "user/repo", "user/repo@revision" or "user/repo/path/to/file" says, as arguments of `from_pretrained`.

    Args:
        text: what was typed.
        ending: of the file's name: "user/name.json" is a path, not a repository.

    Returns:
        None where it can only be a path on disk.
    """
    found = re.fullmatch(rf"({_REPOSITORY})(?:@([\w.-]+))?(?:/(.+{re.escape(ending)}))?", text)
    if found is None or (found[3] is None and text.endswith(ending)):
        return None
    return {"source": found[1], "revision": found[2], "filename": found[3]}


def _located(
    source: "str | os.PathLike[str]", name: str, kind: str, revision: str | None, token: str | bool | None
) -> Path:
    """Path of the file on disk, fetched from the Hub if need be."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / name).is_file():
            return path / name
        held = sorted(str(file.relative_to(path)) for file in path.rglob(f"*{Path(name).suffix}"))
        others = f"it holds {', '.join(held)}: give one as filename=" if held else f"a {kind} is made by {MAKERS[kind]}"
        raise FileNotFoundError(f"there is no {name} in the directory {path}; {others}.")
    if not is_repository_id(str(source)):
        raise FileNotFoundError(
            f"there is no file or directory {source}, and it is no repository's id like user/repo. "
            f"A {kind} is made by {MAKERS[kind]}."
        )
    return _downloaded(str(source), name, revision, token)


def _downloaded(repo_id: str, name: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    api = HfApi(token=token, library_name="dpcache")
    with explained(repo_id, revision=revision):
        try:
            return Path(api.hf_hub_download(repo_id, name, revision=revision))
        except RemoteEntryNotFoundError:
            files = api.list_repo_files(repo_id, revision=revision)
            held = [file for file in files if Path(file).suffix == Path(name).suffix]
    others = f"it holds {', '.join(held)}: give one as filename=" if held else "look for another repository"
    raise HubError(f"there is no {name} in the repository {repo_id}; {others}.")


def _remote_card(api: Any, repo_id: str, revision: str | None) -> str | None:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")
    except RemoteEntryNotFoundError:
        return None


@contextmanager
def explained(repo_id: str, *, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turns what goes wrong between here and the Hub into a HubError of one line that names the remedy."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo_id}"
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no repository's id: give one like user/repo.") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"the repository {repo_id} is gated: accept its terms at {page}, then log in with `hf auth login` or give "
            "token=."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"the repository {repo_id} has no revision {revision or 'of this name'}: its branches and tags are at "
            f"{page}/tree/main."
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError("you are not logged in to the Hub: run `hf auth login`, or give token=.") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refused(error, repo_id, writing)) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HTTPError,  # type: ignore[attr-defined]  # of whichever library it speaks HTTP with
    ) as error:
        if isinstance(error.__cause__, errors.FileMetadataError):
            raise HubError(
                "what answers in place of the Hub is something else: check HF_ENDPOINT and proxy."
            ) from error
        what = "and is needed for writing" if writing else f"and {repo_id} is neither a directory here nor in the cache"
        raise HubError(
            f"the Hub cannot be reached, {what}: go online (HF_HUB_OFFLINE unset), or use a directory with "
            "save_pretrained and from_pretrained."
        ) from error


def _refused(error: Any, repo_id: str, writing: bool) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    status = error.response.status_code
    if writing and (status in (401, 403) or isinstance(error, RepositoryNotFoundError)):
        return f"you may not write to {repo_id}: log in with `hf auth login`, or give token=, as one who may."
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            f"there is no directory {repo_id} here, and on the Hub no repository of this name that you may see: check "
            "it, and if it is private log in with `hf auth login` or give token=."
        )
    reason = error.server_message or "no reason given"
    return f"the Hub answered {status} about {repo_id} ({reason}): try again later."
