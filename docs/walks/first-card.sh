#!/bin/sh
# From a wheel to a report card, in at most 6 minutes of two idle cores and the time of downloads.
#   docs/walks/first-card.sh [FOLDER]
# WHEEL names the wheel to install into an environment of its own; without it the calmix on the
# path is used.
set -eu
began=$(date +%s)
mkdir -p "${1:-out/first-card}" && cd "${1:-out/first-card}"
MODEL=${MODEL:-builtin:smollm2-135m}
if [ -n "${WHEEL:-}" ]; then
  python3 -m venv venv
  venv/bin/python -m pip install -q "$WHEEL"
  PATH=$PWD/venv/bin:$PATH
fi
calmix --version
calmix compress "$MODEL" -o small --effort quick ${SUITE:+--suite "$SUITE"}
ls -d small/card.html small/model small/pack
echo "arrived after $(($(date +%s) - began)) s"
