"""Builds the images with buildah on substitutes for the base images, without a registry and without the real hub.

The CPU image's base is a Debian with Python. The GPU image's base also has vLLM's packages, copied from this
environment, as `vllm-openai` has them; or CUDA and an older torch, as the base images of Spirit's templates.
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
_WHEELS = "/wheels"


class Buildah:
    """buildah with its own storage, which `close` removes.

    Args:
        directory: of the storage.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.command = ["buildah", "--storage-driver", "vfs", f"--root={directory / 'root'}"]
        self.command.append(f"--runroot={directory / 'run'}")

    def run(self, *arguments: str) -> str:
        """Run a buildah command; return its stdout.

        Raises:
            RuntimeError: the command failed; the message has the end of its output.
        """
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"buildah {arguments[0]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def build(self, tag: str, *options: str, context: Path = ROOT) -> str:
        """Build the Dockerfile of a directory; return stdout and stderr."""
        build = ["bud", "--isolation=chroot", "--format=docker", "--network=host", "--tag", tag, *options, str(context)]
        done = subprocess.run(
            [*self.command, *build],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"building {tag} failed:\n{done.stdout[-6000:]}")
        return done.stdout

    def inspect(self, image: str) -> dict[str, Any]:
        """Return the image's configuration."""
        document: dict[str, Any] = json.loads(self.run("inspect", "--type=image", image))
        return document

    def container(self, image: str) -> str:
        """Create a container of the image; return its name."""
        return self.run("from", "--pull-never", image).strip()

    def files(self, container: str) -> Path:
        """Return the directory where the container's files are mounted."""
        return Path(self.run("mount", container).strip())

    def close(self) -> None:
        """Remove all images and containers."""
        self.run("rm", "--all")
        self.run("rmi", "--all", "--force")
        shutil.rmtree(self.directory, ignore_errors=True)


def pip_mounts(directory: Path) -> list[str]:
    """Return the options that give pip in a build the same package sources as on this machine."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(re.findall(r"^(?:global|user|site|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    config = directory / "pip.conf"
    lines = [f"{name} = " + value.replace("\\n", "\n    ") for name, value in settings.items()]
    config.write_text("\n".join(["[global]", *lines]) + "\n", encoding="utf-8")
    paths = {path for value in settings.values() for path in re.findall(r"(?:file://)?(/[^\s\\']+)", value)}
    # An index's files may be next to its pages.
    roots = sorted({str(path.parent if path.name == "simple" else path) for path in map(Path, paths) if path.exists()})
    return [f"--volume={config}:{_PIP}:ro", *(f"--volume={path}:{path}:ro" for path in roots)]


def debian() -> Path:
    """Return a Debian root file system with Python and pip, made once per machine."""
    rootfs = CACHE / "debian"
    if not rootfs.is_dir():
        partial = CACHE / "debian.partial"
        shutil.rmtree(partial, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", f"--include={_DEBIAN}", "bookworm", str(partial)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(partial / "var/cache/apt", ignore_errors=True)
        partial.rename(rootfs)
    return rootfs


def build_python_base(buildah: Buildah, directory: Path) -> str:
    """Build the substitute for the Python image: that Debian; return its name."""
    context = directory / "python"
    context.mkdir()
    _link(debian(), context / "rootfs")
    (context / "Dockerfile").write_text("FROM scratch\nCOPY rootfs /\n", encoding="utf-8")
    buildah.build("test-base/python", context=context)
    return "localhost/test-base/python"


def build_vllm_base(buildah: Buildah, directory: Path, python: str, *, real: bool) -> str:
    """Build the substitute for vLLM's image: vLLM and its dependencies, without the worker's other packages.

    Args:
        buildah: builds it.
        directory: an empty one, on the same disk as this environment: files are hard-linked.
        python: its base image.
        real: with all packages; otherwise vLLM is an empty package, and of those that it brings only what building the
            image needs is there.
    """
    packages = directory / f"vllm-{real}" / "packages"
    if real:
        packages.parent.mkdir()
        _link(Path(sysconfig.get_path("purelib")), packages)
        for name in _packages_not_in_vllm_image():
            for file in importlib.metadata.distribution(name).files or []:
                (packages / file).unlink(missing_ok=True)
        # vLLM's image has no bytecode.
        for cache in list(packages.rglob("__pycache__")):
            shutil.rmtree(cache)
    else:
        (packages / "vllm").mkdir(parents=True)
        (packages / "vllm" / "__init__.py").touch()
        shutil.copytree(Path(sysconfig.get_path("purelib")) / "filelock", packages / "filelock")
    # This environment has vLLM's CPU build, which needs a library that the CUDA build does not.
    library = "RUN apt-get update && apt-get install --yes libnuma1" if real else ""
    copy = 'COPY packages /usr/local/lib/python3.11/dist-packages\nENTRYPOINT ["vllm"]'
    (packages.parent / "Dockerfile").write_text(f"FROM {python}\n{library}\n{copy}\n", encoding="utf-8")
    tag = f"test-base/vllm-{'real' if real else 'empty'}"
    buildah.build(tag, context=packages.parent)
    return f"localhost/{tag}"


def build_cuda_base(buildah: Buildah, directory: Path, python: str) -> str:
    """Build the substitute for an image with CUDA, Python 3.11 and torch 2.5.1 on Ubuntu 22.04, without vLLM.

    There, `python3` is an older Python; here it fails. The packages fail when they are imported.
    """
    context = directory / "cuda"
    for name, version in (("torch", "2.5.1"), ("torchvision", "0.20.1")):
        information = context / "packages" / f"{name}-{version}.dist-info"
        information.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (information / "METADATA").write_text(metadata, encoding="utf-8")
        (context / "packages" / f"{name}.py").write_text(f"raise RuntimeError('{name} of the base')", encoding="utf-8")
    # In place of the CUDA build, the CPU build is installed, which needs a library.
    lines = [
        f"FROM {python}",
        "RUN apt-get update && apt-get install --yes libnuma1",
        "COPY packages /usr/local/lib/python3.11/dist-packages",
        "RUN ln -sf /bin/false /usr/bin/python3",
        "ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64",
    ]
    (context / "Dockerfile").write_text("\n".join([*lines, ""]), encoding="utf-8")
    buildah.build("test-base/cuda", context=context)
    return "localhost/test-base/cuda"


def checkout_for_cpu(directory: Path) -> tuple[Path, str]:
    """Copy the build context, with the CPU build of vLLM in gpu.lock; return the copy, and an option of the build.

    PyTorch's own index is asked for torch only, as by `make`.
    """
    checkout, wheels = directory / "checkout-cpu", directory / "wheels"
    ignore = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, checkout, ignore=ignore)
    lock = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    (torch,) = re.findall("^torch==.*$", lock, re.MULTILINE)
    index = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1", f"--extra-index-url={index}"]
    subprocess.run([*pip, f"--dest={wheels}", torch], check=True)
    text = f"--find-links {_WHEELS}\n{lock}"
    (checkout / "requirements" / "gpu.lock").write_text(text, encoding="utf-8")
    return checkout, f"--volume={wheels}:{_WHEELS}:ro"


def _link(source: Path, target: Path) -> None:
    subprocess.run(["/bin/cp", "-al", str(source), str(target)], check=True)


def _packages_not_in_vllm_image() -> Iterator[str]:
    """Yield the packages of this environment that vLLM's image does not have."""
    for lock in ("worker", "dev"):
        for line in (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8").splitlines():
            name = re.split(r"[=; ]", line)[0]
            try:
                importlib.metadata.distribution(name)
            except (importlib.metadata.PackageNotFoundError, ValueError):
                continue
            yield name


def files_with(directory: Path, content: bytes) -> Sequence[Path]:
    """Return the files below a directory that contain these bytes."""
    done = subprocess.run(
        ["/bin/grep", "-rlaF", content.decode(), str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    return [Path(line) for line in done.stdout.splitlines()]
