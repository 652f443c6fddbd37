#!/usr/bin/env bash
# Make or update .venv from the lock files. Invariant: a stamp is written last, so an interrupted install is
# taken up again, and what a stamp matches is left alone.
# PYTHON=... chooses the interpreter, DEVICE=cpu|gpu overrides what nvidia-smi says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly log=$venv/setup.log
readonly torch_cpu_index=https://download.pytorch.org/whl/cpu  # PyTorch's own, for when pip finds no +cpu build

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

failed() {
  tail -n 15 "$log" >&2
  die "the installation failed; the whole log is $log"
}

detect_device() {
  local gpus
  gpus=$(nvidia-smi -L 2>/dev/null) || true
  case $gpus in
    *GPU*) echo gpu ;;
    *) echo cpu ;;
  esac
}

find_python() {
  local name found=""
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    found=$name
    "$name" -c 'import ensurepip, venv' 2>/dev/null && echo "$name" && return
  done
  [ -z "$found" ] || die "$found cannot make virtual environments; run: apt-get install python3-venv"
  die "no Python 3.11 or newer found${PYTHON:+ as '$PYTHON'}; run: apt-get install python3 python3-venv," \
    "or name one: make setup PYTHON=/path/to/python3.11"
}

# The folder counts too: an environment does not survive a move.
fingerprint_packages() {
  printf '%s %s\n' "$device" "$PWD"
  cat "requirements/$device.lock" requirements/dev.lock | sha256sum
}

is_up_to_date() { [ "$(cat "$venv/$1.stamp" 2>/dev/null)" = "$2" ]; }
mark_done() { printf '%s\n' "$2" >"$venv/$1.stamp"; }

# pip_install LABEL COUNT ARGUMENT...: one counted line for many packages; the whole output goes to the log.
pip_install() {
  local label=$1 count=$2
  shift 2
  "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --no-deps "$@" 2>>"$log" |
    tee -a "$log" |
    awk -v label="$label" -v count="$count" -v is_tty="$([ -t 2 ] && echo 1)" '
      function show(end) { printf "%s  %s: %d of %d%s", is_tty ? "\r" : "", label, seen, count, end; fflush() }
      /^(Collecting|Processing|Requirement already satisfied)/ { seen++; if (is_tty) show(""); else if (seen % 50 == 0) show("\n") }
      /^Installing/ { if (is_tty) print ""; print "  " label ": installing"; fflush() }
    ' >&2
}

install_torch_cpu() {
  local pin
  pin=$(grep '^torch==' requirements/cpu.lock)
  pip_install "$pin" 1 "$pin" && return
  echo "  pip finds no $pin; trying $torch_cpu_index" >&2
  pip_install "$pin" 1 "$pin" --index-url "$torch_cpu_index"
}

install_packages() {
  local count
  count=$(cat "requirements/$device.lock" requirements/dev.lock | grep -cv '^#')
  if [ "$device" = cpu ]; then
    install_torch_cpu || return
  fi
  pip_install packages "$count" -r "requirements/$device.lock" -r requirements/dev.lock
}

device=${DEVICE:-$(detect_device)}
[ -f "requirements/$device.lock" ] || die "DEVICE must be cpu or gpu, not '$device'"
exec 9<scripts/venv.sh
flock 9  # two makes at once: the second waits, and finds it done

packages=$(fingerprint_packages)
if ! is_up_to_date packages "$packages" || ! "$venv/bin/python" -c '' 2>/dev/null; then
  python=$(find_python)
  echo "setup: installing the $device packages into $venv with $("$python" -V 2>&1); the log is $log" >&2
  "$python" -m venv --clear "$venv"
  : >"$log"
  install_packages || failed
  mark_done packages "$packages"
fi

project=$(cat pyproject.toml $(find scripts -name '*.py' | sort) | sha256sum)  # the build back end is among the scripts
if ! is_up_to_date project "$project"; then
  pip_install palaestra 1 --no-build-isolation -e . || failed
  mark_done project "$project"
fi
