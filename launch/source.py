"""The code that is shipped: the repository at one commit, as one file."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(*arguments: str) -> str:
    """Return the standard output of git in the repository. Raises ValueError with git's own words."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def commit(dirty: bool = False) -> str:
    """Return the commit to ship: HEAD, or with ``dirty`` one made of HEAD and the uncommitted changes of tracked files.

    Raises:
      ValueError: the tree has changes that HEAD has not, and ``dirty`` was not asked for.
    """
    changed = git("status", "--porcelain")
    if not changed:
        return git("rev-parse", "HEAD")
    if not dirty:
        files = ", ".join(line[3:] for line in changed.splitlines()[:5])
        raise ValueError(
            f"{len(changed.splitlines())} files differ from the last commit ({files}); a run must name its code. "
            "Commit them, or give --dirty to ship them as they are (new files only after `git add`)"
        )
    # A commit that no branch has; whose it is does not matter.
    someone = ("-c", "user.name=jvlm", "-c", "user.email=jvlm@localhost")
    return git(*someone, "stash", "create") or git("rev-parse", "HEAD")


def require(revision: str, config: str) -> None:
    """Raise ValueError where the config is not in the commit: a path from the root, or a name under configs/."""
    known = set(git("ls-tree", "-r", "--name-only", revision, "--", "configs").splitlines())
    if not known & {config, f"configs/{config}", f"configs/{config}.py"}:
        shipped = ", ".join(sorted(name for name in known if name.endswith(".py")))
        raise ValueError(f"{config} is not in commit {revision[:12]}, which is all that is shipped; it has {shipped}")


def archive(revision: str, folder: Path) -> Path:
    """Write the commit's files as FOLDER/jvlm-COMMIT.tar.gz; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"jvlm-{revision[:12]}.tar.gz"
    git("archive", "--format=tar.gz", f"--output={path.resolve()}", revision)
    return path
