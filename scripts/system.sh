#!/usr/bin/env bash
# Find, or as root install, what is no Python package: a Chromium and bubblewrap. Quick when both are there.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }

# The same names that sandboxes/browser looks for.
have_chromium() {
  local name
  [ -z "${PALAESTRA_CHROMIUM:-}" ] || return 0
  for name in chromium-headless-shell chromium chromium-browser google-chrome; do
    if have "$name"; then return 0; fi
  done
  return 1
}

missing=()
have_chromium || missing+=(chromium-headless-shell)  # 2 to 5 times lighter than chromium
have bwrap || missing+=(bubblewrap)
[ ${#missing[@]} -gt 0 ] || exit 0

if ! have apt-get; then
  echo "setup: missing ${missing[*]}: install them with this system's package manager" >&2
  exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "setup: missing ${missing[*]}; run: sudo apt-get update && sudo apt-get install -y ${missing[*]}" >&2
  exit 1
fi
echo "setup: installing ${missing[*]} with apt-get" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
install() { apt-get install -y -qq --no-install-recommends "$@" >/dev/null </dev/null; }
# Distributions without the light package have `chromium`.
install "${missing[@]}" || install "${missing[@]/chromium-headless-shell/chromium}"
