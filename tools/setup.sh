#!/bin/sh
# Builds .venv and installs the project into it. Does nothing when that is done already.
#
# The stamp holds a hash of the requirement files, the checkout's place (a moved environment is broken) and
# the interpreter. It is written last, so an interrupted installation is taken up again by the next call.
# Plain sh and Python alone: the same on Debian, macOS and elsewhere. PYTHON=… chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.dsv3-stamp
OLDEST=3.11

fingerprint() {
    "$VENV/bin/python" - <<'PY'
import hashlib, os, sys
digest = hashlib.sha256(os.getcwd().encode() + sys.version.encode())
for name in ("pyproject.toml", "constraints.txt"):
    with open(name, "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())
PY
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' >/dev/null 2>&1; }
can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {
    lacking=
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        new_enough "$candidate" || continue
        if can_make_venv "$candidate"; then
            echo "$candidate"
            return
        fi
        [ -n "$lacking" ] || lacking=$candidate
    done
    if [ -n "$lacking" ]; then
        release=$("$lacking" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "make setup: $lacking cannot make virtual environments, because its ensurepip module is missing." >&2
        echo "On Debian or Ubuntu: sudo apt-get install python$release-venv   and then make setup again." >&2
    else
        echo "make setup: no Python $OLDEST or newer was found (looked for: ${PYTHON:-python3.11 python3.12 python3.13 python3})." >&2
        echo "Install Python $OLDEST, or name yours: make setup PYTHON=/path/to/python3.11" >&2
    fi
    exit 1
}

if [ -f "$STAMP" ] && [ "$(fingerprint 2>/dev/null)" = "$(cat "$STAMP")" ]; then
    exit 0
fi

# A new environment unless a sound one stands: its pip runs, and its scripts point here.
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || ! grep -qF "$(pwd -P)/$VENV/" "$VENV/bin/pip"; then
    python=$(find_python)
    echo "Making $VENV with $("$python" --version)."
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
fi

echo "Installing dsv3lib and its requirements into $VENV (the first time takes some minutes)."
quiet=-q
[ -t 1 ] && quiet=
"$VENV/bin/python" -m pip install $quiet --disable-pip-version-check -c constraints.txt -e '.[lab,test]'
fingerprint >"$STAMP.tmp"
mv "$STAMP.tmp" "$STAMP"
echo "Ready: $VENV/bin/dsv3 doctor"
