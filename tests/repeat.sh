#!/usr/bin/env bash
# Run `make test` (or pytest with ARGUMENTS) COUNT times, every second time beside a busy loop on
# every core (LOOPS says how many loops: none where other work fills the machine), and log date,
# loops, seconds, load of five minutes and outcome of each run to repeat.log.
#
#   tests/repeat.sh [COUNT [ARGUMENTS...]]
#
# Ends with code 1 if any run failed; the output of a run that did is kept beside the log.
set -u
cd "$(dirname "$0")/.."
count=${1:-20}
shift || true
log=repeat.log
loops=()
idle() {
  for loop in "${loops[@]}"; do kill "$loop" 2>/dev/null; wait "$loop" 2>/dev/null; done
  loops=()
}
trap idle EXIT
trap 'exit 130' INT TERM
failed=0
for run in $(seq "$count"); do
  beside=$(((run + 1) % 2 * ${LOOPS:-$(nproc)}))
  for _ in $(seq "$beside"); do (while :; do :; done) & loops+=($!); done
  began=$(date +%s)
  if [ $# -gt 0 ]; then
    HF_HUB_OFFLINE=1 "${PYTHON:-.venv/bin/python}" -m pytest "$@" > repeat.out 2>&1
  else
    make test > repeat.out 2>&1
  fi
  code=$?
  seconds=$(($(date +%s) - began))
  load=$(cut -d ' ' -f 2 /proc/loadavg 2>/dev/null || sysctl -n vm.loadavg | cut -d ' ' -f 3)
  idle
  told=$(grep -E '^[0-9]+ (passed|failed)|(passed|failed).* in [0-9.]+s' repeat.out | tail -n 1)
  echo "$(date -u +%Y-%m-%dT%H:%MZ) run $run, loops $beside, ${seconds}s, load $load, code $code: $told" | tee -a "$log"
  if [ $code != 0 ]; then
    failed=1
    mv repeat.out "repeat-$run.out"
  fi
done
rm -f repeat.out
exit $failed
