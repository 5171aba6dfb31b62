#!/usr/bin/env bash
# Download the libraries we are measured against, for a machine with a GPU and no network: benchmarks/fetch_peers.sh DIR
#
# Wheels for Linux and the Python of that machine, without torch and triton, which it has; each cut into parts of at
# most 48 MiB, with checksums. What has no wheel is left out, and DIR/absent.txt says why. There, benchmarks/use_peers.sh
# DIR installs them. PEERS="liger-kernel ..." chooses others, PYTHON_VERSION (default 3.12) and PYTHON another Python.
set -euo pipefail

DIR=${1:?"usage: benchmarks/fetch_peers.sh DIR"}
PYTHON=${PYTHON:-python3}
VERSION=${PYTHON_VERSION:-3.12}
PART=${PART_BYTES:-$((48 << 20))}
# Each with what it imports that a machine with torch lacks: pip would bring another torch with it.
PEERS=${PEERS:-"liger-kernel quack-kernels flash-attn-4 flashinfer-python natten comfy-kitchen fastvideo-kernel diffusers
  nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base apache-tvm-ffi torch-c-dlpack-ext einops huggingface-hub safetensors
  importlib-metadata zipp regex httpx hf-xet tqdm pyyaml tabulate nvidia-ml-py nvidia-cudnn-frontend cuda-python
  cuda-bindings cuda-pathfinder"}

mkdir -p "$DIR"
rm -f "$DIR"/*.whl "$DIR"/*.whl.part-* "$DIR"/SHA256SUMS "$DIR"/absent.txt
for peer in $PEERS; do
  platforms=()
  for glibc in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
  if ! said=$("$PYTHON" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: \
    --python-version "$VERSION" "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$DIR" "$peer" 2>&1); then
    printf '%s: %s\n' "$peer" "$(tail -n 1 <<< "$said")" | tee -a "$DIR/absent.txt" >&2
  fi
done
cd "$DIR"
compgen -G '*.whl' > /dev/null || { echo "fetch_peers.sh: nothing was downloaded; see $DIR/absent.txt" >&2; exit 1; }
sha256sum -- *.whl > SHA256SUMS
for wheel in *.whl; do
  if [ "$(stat -c %s "$wheel")" -gt "$PART" ]; then
    split --bytes="$PART" "$wheel" "$wheel.part-"
    rm "$wheel"
  fi
done
printf '%s wheels in %s files, %s\n' "$(wc -l < SHA256SUMS)" "$(ls | wc -l)" "$(du -sh . | cut -f 1)"
