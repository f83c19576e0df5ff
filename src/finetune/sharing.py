"""What other machines get of this repository: a revision from its git remote, and files from its DVC remote."""

import uuid
from pathlib import Path

from finetune.clones import Repository, dvc, git
from finetune.errors import UserError

ORIGIN = "origin"
SHOWN = 3  # changed files in an error


def check(repository: Repository) -> str:
    """Return the URL of the git remote. Raises UserError where another machine would not get what is here.

    That is the revision, from a git remote that can be reached, and a DVC remote that can be written.
    """
    changed = git(repository.root, "diff", "--name-only", "HEAD").splitlines()
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(
            f"{', '.join(changed[:SHOWN])}{more}: uncommitted changes, which the other machines would not see.\n"
            "Commit and push them, or put them aside: git stash"
        )
    try:
        url = git(repository.root, "remote", "get-url", ORIGIN).strip()
    except UserError:
        raise UserError(
            f"there is no git remote {ORIGIN}, from which the other machines get the revision.\n"
            f"git remote add {ORIGIN} URL && git push -u {ORIGIN} HEAD"
        ) from None
    try:
        git(repository.root, "fetch", "-q", ORIGIN)
    except UserError as error:
        raise UserError(f"the git remote {ORIGIN} refuses: {str(error).splitlines()[0]}") from None
    if not git(repository.root, "for-each-ref", "--contains", repository.commit, f"refs/remotes/{ORIGIN}"):
        raise UserError(
            f"the commit {repository.commit[:7]} is not on {ORIGIN}, so the other machines can't get it: git push"
        )
    if problem := storage_problem(repository.root):
        raise UserError(problem)
    return str(Path(repository.root, url).resolve()) if Path(repository.root, url).exists() else url


def storage_problem(folder: Path) -> str | None:
    """Return why the DVC remote of the repository in a folder can't be written, or None. An empty file is tried."""
    from dvc.config import NoRemoteError
    from dvc.repo import Repo

    try:
        with Repo(str(folder)) as repo:
            remote = repo.cloud.get_remote()
            probe = remote.fs.join(remote.path, "tmp", uuid.uuid4().hex)
            remote.fs.makedirs(remote.fs.parent(probe), exist_ok=True)
            remote.fs.pipe_file(probe, b"")
            remote.fs.rm_file(probe)
    except NoRemoteError:
        return "there is no DVC remote, over which machines share files: dvc remote add -d storage URL"
    except Exception as error:  # of whichever package knows that kind of remote
        return f"the DVC remote refuses: {error or type(error).__name__}"
    return None


def fetch(repository: Repository, name: str) -> None:
    """Have the repository have the experiments of that name on the git remote; `*` stands for any characters.

    Only what git has of them, which is all that the table shows. Raises UserError where there is none of a full name.
    """
    reference = repository.reference(name)
    git(repository.root, "fetch", "-q", "--no-tags", "--no-auto-maintenance", ORIGIN, f"{reference}:{reference}")


def pull(repository: Repository, names: list[str]) -> None:
    """Have the files of experiments, too, for `dvc exp apply`. Raises UserError where that fails."""
    if names:
        dvc(repository.root, "exp", "pull", ORIGIN, *names)


def push(folder: Path, repository: Repository, name: str) -> None:
    """Push an experiment from a clone of the repository: its files first, as whoever sees its name may want them.

    Raises UserError where a remote refuses, or the name is taken by another experiment.
    """
    from dvc.repo import Repo

    reference = repository.reference(name)
    try:
        with Repo(str(folder)) as repo:
            repo.push(revs=[git(folder, "rev-parse", reference).strip()], workspace=False)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"the DVC remote refuses: {error or type(error).__name__}") from None
    url = git(repository.root, "remote", "get-url", ORIGIN).strip()
    git(folder, "push", "-q", url, f"{reference}:{reference}")
