"""Images built for real, by buildah, on stand-ins for the base images: no registry and no hub is asked.

The base of the CPU image is a Debian with Python; that of the GPU image has vLLM's packages besides, as `vllm-openai`
has them: those of this environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-serverless" / "image-test"
_DEBIAN = "python3,python3-pip,ca-certificates,procps"
_PIP = "/etc/pip.conf"


class Buildah:
    """buildah with a storage of its own, which goes with `close`.

    Args:
        directory: where the storage is.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.command = ["buildah", "--storage-driver", "vfs", f"--root={directory / 'root'}"]
        self.command.append(f"--runroot={directory / 'run'}")

    def run(self, *arguments: str) -> str:
        """Run a command of it; return what it prints.

        Raises:
            RuntimeError: it failed; the message is the end of what it said.
        """
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"buildah {arguments[0]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def build(self, tag: str, *options: str, context: Path = ROOT) -> str:
        """Build the Dockerfile of a directory; return what was printed, the errors among it."""
        build = ["bud", "--isolation=chroot", "--format=docker", "--network=host", "--tag", tag, *options, str(context)]
        done = subprocess.run(
            [*self.command, *build],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{tag} cannot be built:\n{done.stdout[-6000:]}")
        return done.stdout

    def inspect(self, image: str) -> dict[str, Any]:
        """What the image's configuration says."""
        document: dict[str, Any] = json.loads(self.run("inspect", "--type=image", image))
        return document

    def container(self, image: str) -> str:
        """A new container of the image; its name."""
        return self.run("from", "--pull-never", image).strip()

    def files(self, container: str) -> Path:
        """Where the container's files lie on this machine."""
        return Path(self.run("mount", container).strip())

    def close(self) -> None:
        """Remove all images and containers."""
        self.run("rm", "--all")
        self.run("rmi", "--all", "--force")
        shutil.rmtree(self.directory, ignore_errors=True)


def pip_mounts(directory: Path) -> list[str]:
    """Options that let pip in a build find packages where it finds them on this machine."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(re.findall(r"^(?:global|user|site|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    config = directory / "pip.conf"
    lines = [f"{name} = " + value.replace("\\n", "\n    ") for name, value in settings.items()]
    config.write_text("\n".join(["[global]", *lines]) + "\n", encoding="utf-8")
    paths = {path for value in settings.values() for path in re.findall(r"(?:file://)?(/[^\s\\']+)", value)}
    # An index's files may lie beside its pages.
    roots = sorted({str(path.parent if path.name == "simple" else path) for path in map(Path, paths) if path.exists()})
    return [f"--volume={config}:{_PIP}:ro", *(f"--volume={path}:{path}:ro" for path in roots)]


def debian() -> Path:
    """A Debian with Python and pip, made once a machine."""
    rootfs = CACHE / "debian"
    if not rootfs.is_dir():
        unfinished = CACHE / "debian.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", f"--include={_DEBIAN}", "bookworm", str(unfinished)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(unfinished / "var/cache/apt", ignore_errors=True)
        unfinished.rename(rootfs)
    return rootfs


def stand_in_for_python(buildah: Buildah, directory: Path) -> str:
    """An image of that Debian."""
    context = directory / "python"
    context.mkdir()
    _link(debian(), context / "rootfs")
    (context / "Dockerfile").write_text("FROM scratch\nCOPY rootfs /\n", encoding="utf-8")
    buildah.build("stand-in/python", context=context)
    return "localhost/stand-in/python"


def stand_in_for_vllm(buildah: Buildah, directory: Path, python: str, *, real: bool) -> str:
    """An image that has vLLM and what it needs, and none of what the worker needs beside that.

    Args:
        buildah: makes it.
        directory: an empty one, on the same disk as this environment: files are linked.
        python: the image it is made from.
        real: with all packages; otherwise vLLM is an empty package, which is enough to build on.
    """
    packages = directory / f"vllm-{real}" / "packages"
    if real:
        packages.parent.mkdir()
        _link(Path(sysconfig.get_path("purelib")), packages)
        for name in _not_vllms():
            for file in importlib.metadata.distribution(name).files or []:
                (packages / file).unlink(missing_ok=True)
    else:
        (packages / "vllm").mkdir(parents=True)
        (packages / "vllm" / "__init__.py").touch()
    # The CPU build, which stands in for the CUDA build, needs a library that the image has no use for.
    library = "RUN apt-get update && apt-get install --yes libnuma1" if real else ""
    copy = 'COPY packages /usr/local/lib/python3.11/dist-packages\nENTRYPOINT ["vllm"]'
    (packages.parent / "Dockerfile").write_text(f"FROM {python}\n{library}\n{copy}\n", encoding="utf-8")
    tag = f"stand-in/vllm-{'real' if real else 'empty'}"
    buildah.build(tag, context=packages.parent)
    return f"localhost/{tag}"


def _link(source: Path, target: Path) -> None:
    subprocess.run(["/bin/cp", "-al", str(source), str(target)], check=True)


def _not_vllms() -> Iterator[str]:
    """Packages of this environment that the image's vLLM does not bring along."""
    for lock in ("worker", "dev"):
        for line in (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8").splitlines():
            name = re.split(r"[=; ]", line)[0]
            try:
                importlib.metadata.distribution(name)
            except (importlib.metadata.PackageNotFoundError, ValueError):
                continue
            yield name


def holds(directory: Path, secret: bytes) -> Sequence[Path]:
    """The files below a directory that contain these bytes."""
    done = subprocess.run(
        ["/bin/grep", "-rlaF", secret.decode(), str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    return [Path(line) for line in done.stdout.splitlines()]
