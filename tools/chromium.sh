#!/bin/sh
# Sees to it that the browser tests have a Chromium: installs it where that takes no question (root on
# Debian), else says how. With CI=true a missing browser is an error.
set -eu

present() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null 2>&1 && return 0
    done
    [ -x "/Applications/Chromium.app/Contents/MacOS/Chromium" ] && return 0
    [ -x "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" ] && return 0
    return 1
}

present && exit 0
[ -n "${DSV3_BROWSER:-}" ] && [ -x "$DSV3_BROWSER" ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing Chromium for the browser tests."
    export DEBIAN_FRONTEND=noninteractive
    if apt-get update -qq && apt-get install -y -qq --no-install-recommends \
        chromium fonts-dejavu-core fonts-wqy-microhei >/dev/null && present; then
        exit 0
    fi
fi

echo "No Chromium was found, so the browser tests cannot run. To have them:" >&2
echo "  Debian, Ubuntu:  sudo apt-get install chromium fonts-dejavu-core fonts-wqy-microhei" >&2
echo "  macOS:           brew install --cask chromium" >&2
echo "  elsewhere:       set DSV3_BROWSER to the path of a Chromium or Chrome" >&2
[ "${CI:-}" = true ] && exit 1
exit 0
