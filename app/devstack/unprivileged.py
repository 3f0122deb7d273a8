"""PostgreSQL refuses to run as root. Where we are root, it gets a user of its own, and a way to its files."""

import logging
import os
import pwd
import shutil
import stat
import subprocess
import time
from pathlib import Path

SYSTEM_USER = "agent-postgres"
_ATTEMPTS = 20

logger = logging.getLogger(__name__)


def user_for_postgres() -> tuple[int, int] | None:
    """Numeric user and group that PostgreSQL has to run as; None where we are not root and it runs as we do.

    Makes the system user `agent-postgres` the first time. Raises `PermissionError` where that cannot be done.
    """
    if os.geteuid() != 0:
        return None
    for _ in range(_ATTEMPTS):
        try:
            entry = pwd.getpwnam(SYSTEM_USER)
        except KeyError:
            problem = _add_user()
            time.sleep(0.1 if problem else 0)  # somebody else may hold the lock on /etc/passwd, adding the same user
        else:
            return entry.pw_uid, entry.pw_gid
    raise PermissionError(
        f"PostgreSQL does not run as root, and the user {SYSTEM_USER} cannot be made: {problem}. Run as another user."
    )


def open_the_way(path: Path) -> None:
    """Let other users through every directory above `path`: nothing more than the right to pass (o+x)."""
    for directory in path.resolve().parents:
        mode = stat.S_IMODE(directory.stat().st_mode)
        if not mode & stat.S_IXOTH:
            logger.warning("letting other users pass through %s, so that PostgreSQL's can reach %s", directory, path)
            directory.chmod(mode | stat.S_IXOTH)


def open_for_reading(tree: Path) -> None:
    """Let other users read what is installed under `tree`, where a strict umask has kept them out."""
    for path in (tree, *tree.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        if mode & wanted != wanted:
            path.chmod(mode | wanted)


def _add_user() -> str:
    """Make the user. Returns what went wrong, or nothing."""
    if shutil.which("useradd") is None:
        return "there is no useradd"
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
    return subprocess.run(command, check=False, capture_output=True, text=True).stderr.strip()
