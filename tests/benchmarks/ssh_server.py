"""A real ssh server on loopback: OpenSSH's where it is installed, else asyncssh's, with keys of its own and an unprivileged port.

    python -m tests.benchmarks.ssh_server PORT HOSTKEY AUTHORIZED        (asyncssh; runs until it is ended)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def sshd() -> str | None:
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def serving(kind: str, folder: Path) -> Iterator[Path]:
    """Start a server; gives the ssh configuration that reaches it under the name `board`."""
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copyfile(folder / "user.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made_run = False
    if kind == "sshd":
        (folder / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPidFile none\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nLogLevel ERROR\n",
            encoding="utf-8",
        )
        if os.getuid() == 0 and not Path("/run/sshd").exists():  # where sshd, as root, confines the part that talks to strangers
            Path("/run/sshd").mkdir(mode=0o755)
            made_run = True
        command = [str(sshd()), "-D", "-e", "-f", str(folder / "sshd_config")]
    else:
        command = [sys.executable, "-m", "tests.benchmarks.ssh_server", str(port), str(folder / "host"), str(folder / "authorized")]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text(encoding='utf-8')}", encoding="utf-8")
    (folder / "config").write_text(
        f"Host board\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/user\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/known\n", encoding="utf-8"
    )
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
                break
            if process.poll() is not None:
                raise RuntimeError(process.stderr.read().decode() if process.stderr else "")
            time.sleep(0.1)
        yield folder / "config"
    finally:
        process.terminate()
        process.wait(timeout=10)
        if made_run:
            Path("/run/sshd").rmdir()


async def _serve(port: int, host_key: str, authorized: str) -> None:
    import asyncssh

    async def session(process: asyncssh.SSHServerProcess) -> None:
        pipe = subprocess.PIPE
        with subprocess.Popen(process.command or "true", shell=True, stdin=pipe, stdout=pipe, stderr=pipe) as child:
            await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
            await process.stdout.drain()
            await process.stderr.drain()
            process.exit(await asyncio.get_running_loop().run_in_executor(None, child.wait))

    await asyncssh.listen("127.0.0.1", port, server_host_keys=[host_key], authorized_client_keys=authorized, process_factory=session, encoding=None)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
