#!/bin/sh
# From your own chats to a smaller model: about 5 minutes on two idle cores.
#   docs/walks/own-chats.sh [FOLDER]
# CHATS=FILE is your .jsonl file with a field `messages`; without it, the script invents some chats.
set -eu
began=$(date +%s)
[ -z "${CHATS:-}" ] || CHATS=$(realpath "$CHATS")
mkdir -p "${1:-out/own-chats}" && cd "${1:-out/own-chats}"
MODEL=${MODEL:-builtin:smollm2-135m}
if [ -z "${CHATS:-}" ]; then
  CHATS=chats.jsonl
  i=0
  while [ $i -lt 400 ]; do
    i=$((i + 1))
    echo '{"messages": [{"role": "user", "content": "My order '$i' has not come. Where is it?"},
      {"role": "assistant", "content": "I am sorry to hear that. Order '$i' left our store on day
      '$((i % 28 + 1))', and should be with you within '$((i % 5 + 2))' days."}]}' | tr '\n' ' '
    echo
  done > $CHATS
fi
calmix calibrate show "$CHATS"
calmix compress "$MODEL" -o small --effort quick --calibration "$CHATS:1,${REST:-encyclopedia:1}" ${SUITE:+--suite "$SUITE"}
ls -d small/card.html small/model.gguf
echo "arrived after $(($(date +%s) - began)) s"
