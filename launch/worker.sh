#!/bin/bash
# What a worker runs when launch/tpu.py asks it to. State is in ~/jvlm-job: log, pid, exit ("CODE TIME").
#   install EXTRA       virtual environment with jvlm; again does nothing
#   start COMMAND...    run detached; an older job is stopped first
#   status              one line: JVLM-STATUS worker=NAME state=idle|running|exited|lost code=CODE time=TIME
#   log OFFSET          JVLM-LOG NEXT_OFFSET, and what follows OFFSET in the log, 256 KiB at most
#   tail LINES          the end of the log
#   stop SECONDS        SIGTERM, so that a checkpoint is written; SIGKILL after SECONDS
set -eu
code=$(cd "$(dirname "$0")/.." && pwd)
job=$HOME/jvlm-job
mkdir -p "$job"

running() { [ -s "$job/pid" ] && kill -0 -- "-$(cat "$job/pid")" 2>/dev/null; }

stop() {
  running || return 0
  group=$(cat "$job/pid")
  kill -TERM -- "-$group" 2>/dev/null || true
  for _ in $(seq "$((${1:-60} * 5))"); do
    running || return 0
    sleep 0.2
  done
  kill -KILL -- "-$group" 2>/dev/null || true
}

case $1 in
  install)
    cd "$code"
    [ -e .venv/.installed ] && exit 0
    # The runtime images' own Python may be too old for jvlm; uv brings one.
    command -v "$HOME/.local/bin/uv" >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    "$HOME/.local/bin/uv" venv --quiet --python 3.11 --allow-existing .venv
    "$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python -c constraints.txt -e ".[$2]"
    touch .venv/.installed
    ;;
  start)
    shift
    stop 60
    rm -f "$job/exit" "$job/pid"
    : >"$job/log"
    export PATH="$code/.venv/bin:$PATH"
    cd "$code"
    # A session of its own outlives the ssh connection, and is the process group that stop ends.
    # trap: SIGTERM goes to the whole group, and the exit status is to be written after the job has saved.
    setsid bash -c 'trap : TERM; echo $$ >"$0/pid.new"; mv "$0/pid.new" "$0/pid"
      "$@"; status=$?; echo "$status $(date +%s)" >"$0/exit.new"; mv "$0/exit.new" "$0/exit"' \
      "$job" "$@" >>"$job/log" 2>&1 </dev/null &
    until [ -s "$job/pid" ]; do sleep 0.01; done
    ;;
  status)
    state=idle code=- time=-
    if [ -e "$job/exit" ]; then
      read -r code time <"$job/exit"
      state=exited
    elif running; then
      state=running
    elif [ -e "$job/pid" ]; then
      state=lost
    fi
    echo "JVLM-STATUS worker=$(hostname) state=$state code=$code time=$time"
    ;;
  log)
    size=$(stat -c %s "$job/log" 2>/dev/null || echo 0)
    [ "$2" -le "$size" ] && from=$2 || from=0
    end=$((size - from > 262144 ? from + 262144 : size))
    echo "JVLM-LOG $end"
    tail -c "+$((from + 1))" "$job/log" 2>/dev/null | head -c "$((end - from))" || true
    ;;
  tail) tail -n "$2" "$job/log" ;;
  stop) stop "$2" ;;
  *)
    echo "unknown: $1" >&2
    exit 2
    ;;
esac
