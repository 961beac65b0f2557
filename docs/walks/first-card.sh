#!/bin/sh
# From a wheel to a report card: about 5 minutes on two idle cores, plus the downloads.
#   docs/walks/first-card.sh [FOLDER]
# WHEEL=FILE installs that wheel into a new environment; without it, the installed calmix runs.
set -eu
began=$(date +%s)
[ -z "${WHEEL:-}" ] || WHEEL=$(realpath "$WHEEL")
mkdir -p "${1:-out/first-card}" && cd "${1:-out/first-card}"
MODEL=${MODEL:-builtin:smollm2-135m}
if [ -n "${WHEEL:-}" ]; then
  python3 -m venv venv
  venv/bin/python -m pip install -q "$WHEEL"
  PATH=$PWD/venv/bin:$PATH
fi
calmix --version
calmix compress "$MODEL" -o small --effort quick ${SUITE:+--suite "$SUITE"}
ls -d small/card.html small/model.gguf
echo "arrived after $(($(date +%s) - began)) s"
