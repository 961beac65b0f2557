#!/bin/sh
# A study of two calibration sets, from study file to report: about half an hour on two cores with
# the builtin model (estimated by `study plan`).
#   docs/walks/two-sets.sh [FOLDER]
set -eu
began=$(date +%s)
mkdir -p "${1:-out/two-sets}" && cd "${1:-out/two-sets}"
cat > study.yaml <<END
name: two-sets
models: ["${MODEL:-builtin:smollm2-135m}"]
suite: ${SUITE:-offline}
quick: true
calibrations:
  code: ${ONE:-python-stdlib}
  stories: ${TWO:-stories}
methods: {sparsegpt: [0.6]}
rows: ${ROWS:-32}
length: ${LENGTH:-512}
seeds: [0, 1]
END
calmix study plan study.yaml
calmix study run study.yaml -o store
calmix study report store
echo "arrived after $(($(date +%s) - began)) s"
