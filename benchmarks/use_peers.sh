#!/usr/bin/env bash
# Install what benchmarks/fetch_peers.sh has downloaded, without a network: benchmarks/use_peers.sh DIR [TARGET]
#
# The parts are joined and checked, and unpacked into TARGET (default build/peers), beside nothing that is installed:
#     PYTHONPATH=build/peers make gpu
# A peer that does not import is named with the reason, and does not stop the others.
set -euo pipefail

DIR=${1:?"usage: benchmarks/use_peers.sh DIR [TARGET]"}
TARGET=${2:-build/peers}
PYTHON=${PYTHON:-python3}
[ -f "$DIR/SHA256SUMS" ] || { echo "use_peers.sh: $DIR has no SHA256SUMS: benchmarks/fetch_peers.sh makes it" >&2; exit 1; }

whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
while read -r _ wheel; do
  if [ -f "$DIR/$wheel" ]; then cp "$DIR/$wheel" "$whole"
  elif compgen -G "$DIR/$wheel.part-*" > /dev/null; then cat "$DIR/$wheel".part-* > "$whole/$wheel"
  else echo "use_peers.sh: $wheel is missing in $DIR: copy the whole folder" >&2; exit 1
  fi
done < "$DIR/SHA256SUMS"
sums=$(realpath "$DIR/SHA256SUMS")
(cd "$whole" && sha256sum --check --quiet "$sums") \
  || { echo "use_peers.sh: a wheel is not what was downloaded: copy $DIR again" >&2; exit 1; }
"$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --upgrade --target "$TARGET" "$whole"/*.whl
for module in liger_kernel quack flash_attn.cute flashinfer natten comfy_kitchen fastvideo_kernel diffusers; do
  [ -e "$TARGET/${module//.//}" ] || continue
  said=$(PYTHONPATH="$TARGET" "$PYTHON" -c "import $module" 2>&1) && echo "$module: usable" \
    || echo "$module: does not import: $(tail -n 1 <<< "$said")"
done
[ ! -f "$DIR/absent.txt" ] || sed 's/^/absent: /' "$DIR/absent.txt"
echo "PYTHONPATH=$TARGET make gpu measures beside them"
