#!/usr/bin/env bash
# The part of deploy/tpu_pod.sh that runs on each TPU VM, in ~/nalora-launch; tpu_pod.sh copies and calls it.
#
# It uses what the image of Ubuntu 22.04 has: bash, coreutils, util-linux, tar, Python 3.10 with pip. uv brings Python
# 3.11. The run's log, process id and exit status are in ~/nalora-run, the environment in ~/nalora-env.
# Written for: Python 3.11, jax[tpu] 0.10.2. Not run on hardware.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
run=$HOME/nalora-run
env=$HOME/nalora-env

pid() { cat "$run/pid" 2>/dev/null; }

alive() { # also after a restart of the machine, when another process may have the id
  [[ -n $(pid) ]] && grep -qsa nalora "/proc/$(pid)/cmdline"
}

state() {
  if alive; then
    echo "running, pid $(pid)"
  elif [[ ! -e $run/log ]]; then
    echo "not started"
  elif [[ ! -e $run/status ]]; then
    echo "ended without a status (the machine was restarted); start resumes"
  else
    case $(cat "$run/status") in
      0) echo "ended, status 0: done" ;;
      2) echo "ended, status 2: see the error in the log" ;;
      75 | 134) echo "ended, status $(cat "$run/status"): another worker was lost; start resumes" ;;
      143) echo "ended, status 143: $(stopped); start resumes" ;;
      *) echo "ended, status $(cat "$run/status"): see the log" ;;
    esac
  fi
}

stopped() { # the run's last words: those since the line with which `supervise` began it
  if sed -n '/^=== [^ ]* [^ ]*$/h; /^interrupted by/H; ${x; p}' "$run/log" | grep -qs 'saved step'; then
    echo "stopped, with a checkpoint"
  else
    echo "stopped, without a new checkpoint"
  fi
}

status() {
  echo "$(hostname): $(state)"
  tail -n 1 "$run/log" 2>/dev/null | cut -c 1-200 | sed 's/^/    /' || true
}

install() {
  local wanted
  wanted=$(sha256sum <"$here/source.tar.gz")
  [[ $(cat "$env/installed" 2>/dev/null) != "$wanted" ]] || return 0
  python3 -m pip install --quiet --user uv
  rm -rf "$env" "$here/source"
  mkdir "$here/source"
  tar -xzf "$here/source.tar.gz" -C "$here/source"
  "$HOME/.local/bin/uv" venv --quiet --python 3.11 "$env"
  "$HOME/.local/bin/uv" pip install --quiet --python "$env/bin/python" 'jax[tpu]==0.10.2' "$here/source[tpu,gcs,datasets]"
  echo "$wanted" >"$env/installed"
}

start() {
  mkdir -p "$run"
  if alive; then
    status
    return
  fi
  keep_slice
  install
  rm -f "$run/pid" "$run/status"
  # Without lingering, systemd-logind may remove the user's shared memory when the last ssh session ends (RemoveIPC).
  sudo -n loginctl enable-linger "$USER" 2>/dev/null || true
  setsid nohup bash "$0" supervise >>"$run/log" 2>&1 </dev/null &
  until [[ -s $run/pid ]]; do sleep 0.1; done
  status
}

# The run, its process id while it lives, and its status when it has ended. systemd's SIGTERM at shutdown is passed on.
supervise() {
  local flags=() child status=0
  mapfile -d '' -t flags <"$here/flags"
  if [[ -e $here/hf_token ]]; then
    HF_TOKEN=$(cat "$here/hf_token")
    export HF_TOKEN
    rm "$here/hf_token"
  fi
  echo "=== $(date -u +%FT%TZ) $(hostname)"
  "$env/bin/nalora" train "${flags[@]}" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  echo "$child" >"$run/pid"
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a trapped signal ended the wait
    status=0
    wait "$child" || status=$?
  done
  echo "$status" >"$run/status"
  echo "=== $(date -u +%FT%TZ) ended with status $status"
}

stop() {
  keep_slice
  ! alive || kill -TERM "$(pid)"
  for ((i = 0; i < 300; i++)); do # at most five minutes for a step and a checkpoint
    sleep 1
    alive || break
  done
  status
}

# Ends the process of `delete-when-done`: a run that is stopped, or started without it, leaves the slice as it is.
keep_slice() {
  local deleter
  deleter=$(cat "$run/deleter" 2>/dev/null) || return 0
  ! grep -qsa delete-now "/proc/$deleter/cmdline" || kill -TERM -- "-$deleter" 2>/dev/null || true
  rm -f "$run/deleter"
}

# Deletes the slice a minute after the run has ended, unless it was started again by then.
delete_when_done() { # NAME ZONE
  local pause=${NALORA_DELETE_AFTER:-60}
  echo "$$" >"$run/deleter" # the leader of its process group
  until ! alive && sleep "$pause" && ! alive; do sleep 5; done
  gcloud compute tpus queued-resources delete "$1" --zone "$2" --force --quiet --async ||
    gcloud compute tpus tpu-vm delete "$1" --zone "$2" --quiet --async ||
    echo "error: the slice $1 could not be deleted and is still billed"
}

{ # bash reads this group as a whole: the next start replaces this file, while a command may still run
  case $1 in
    start) start ;;
    status) status ;;
    stop) stop ;;
    supervise) supervise ;;
    delete-when-done)
      keep_slice
      setsid nohup bash "$0" delete-now "$2" "$3" >>"$run/log" 2>&1 </dev/null &
      until [[ -s $run/deleter ]]; do sleep 0.1; done
      echo "The slice $2 will be deleted when the run has ended."
      ;;
    delete-now) delete_when_done "$2" "$3" ;;
    *) exit 2 ;;
  esac
  exit
}
