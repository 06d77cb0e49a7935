#!/usr/bin/env bash
# Updates the lock files from pyproject.toml: `make lock`. A version that still fits stays as it is;
# `make lock ARGS=--upgrade` takes the newest of every package. Arguments are passed to `uv pip compile`.
#
#   cpu.lock      what runs the worker on a CPU
#   dev.lock      what its tests and checks need in addition
#   gpu.lock      what runs it on a GPU, vLLM's CUDA build included
#   worker.lock   the same without what vLLM itself needs: for an image that has vLLM
#   builder.lock  what downloads and verifies a model
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${UV:-uv}
options=("$@")
PLAIN=(--quiet --no-annotate --no-header --no-emit-find-links --no-emit-index-url)
made=$(mktemp -d)
trap 'rm -r "$made"' EXIT

compile() {  # NAME OPTION...: a lock in $made; uv prefers the versions that the file has already
    local name=$1
    shift
    "$UV" pip compile "${PLAIN[@]}" "${options[@]}" --output-file "$made/$name" "$@"
}
names() { sed 's/[=; ].*//' "$1"; }
write() {  # NAME: from standard input
    { echo "# Made by \`make lock\` from pyproject.toml."; cat; } > "requirements/$1.lock"
}

for name in cpu gpu worker builder; do cp "requirements/$name.lock" "$made/$name"; done
cat requirements/cpu.lock requirements/dev.lock > "$made/all"

# PyTorch's CPU build is on an index of its own, or in a directory; only these two may look there.
cpu=(pyproject.toml --python-version 3.11 --extra cpu --extra spirit)
compile cpu "${cpu[@]}"
compile all "${cpu[@]}" --extra dev --constraint "$made/cpu"
unset UV_FIND_LINKS
gpu=(--no-config --override requirements/gpu-overrides.txt --python-platform x86_64-manylinux_2_28)
compile gpu pyproject.toml --extra gpu --extra spirit "${gpu[@]}" --python-version 3.11
# For the Python of any image that has vLLM.
compile worker pyproject.toml --extra spirit --no-config --override requirements/gpu-overrides.txt --constraint "$made/gpu" \
    --universal --python-version 3.11
compile vllm <(grep '^vllm==' "$made/gpu") "${gpu[@]}" --constraint "$made/gpu" --python-version 3.11
extra='import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["builder"])'
compile builder --no-config <(python3 -c "$extra" | tr ' ' '\n') --constraint "$made/cpu" --python-version 3.11

write cpu < "$made/cpu"
grep -vxFf "$made/cpu" "$made/all" | write dev
write gpu < "$made/gpu"
{ grep -E '^(bitsandbytes|vllm-bnb-plugin)==' "$made/gpu"; cat "$made/worker"; } |
    grep -vEf <(names "$made/vllm" | sed 's/.*/^&[=; ]/') | grep -v "sys_platform == 'never'" | write worker
write builder < "$made/builder"
