"""A PostgreSQL server for tests: its files and its socket are in a temporary folder, and gone at the end."""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import psycopg

_PATIENCE = 60
_OPTIONS = "-c", "listen_addresses=", "-c", "shared_buffers=8MB", "-c", "max_connections=40", "-c", "autovacuum=off"


class Server:
    """Start it, kill it, start it again; ``conninfo`` names an empty schema each time."""

    def __init__(self, folder):
        self.folder, self._process = Path(folder), None
        self._schemas = itertools.count()
        self._as_other = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as_other = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        options = "-U", "tests", "--auth=trust", "--no-sync", "--locale=C", "-E", "LATIN1"
        self._run("initdb", "-D", str(self.folder / "data"), *options)

    @property
    def base(self):
        return f"host={self.folder} user=tests dbname=postgres"

    def start(self):
        with (self.folder / "messages").open("ab") as messages:
            command = [_program("postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder), *_OPTIONS]
            dying = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []  # with the tests
            self._process = subprocess.Popen(
                [*self._as_other, *dying, *command], cwd=self.folder, stderr=messages, stdout=messages
            )
        deadline = monotonic() + _PATIENCE
        while True:
            try:
                psycopg.connect(self.base).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "messages").read_text()
                assert monotonic() < deadline
                sleep(0.05)

    def kill(self):
        """At once, as a crash would."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def execute(self, statement, parameters=()):
        with psycopg.connect(self.base, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def conninfo(self):
        name = f"s{next(self._schemas)}"
        self.execute(f"CREATE SCHEMA {name}")
        return f"{self.base} options='-c search_path={name}'"

    def _run(self, program, *arguments):
        command = [*self._as_other, _program(program), *arguments]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL)


@contextmanager
def server():
    """A server that runs."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # a socket's path is short
        running = Server(folder)
        running.start()
        try:
            yield running
        finally:
            running.kill()


def _program(name):
    found = shutil.which(name)
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # where Debian keeps them
    assert found or versions, f"{name} of PostgreSQL must be installed (apt-get install postgresql)"
    return found or str(versions[-1])
