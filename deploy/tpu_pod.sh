#!/usr/bin/env bash
# Trains on a Cloud TPU slice from your own machine. The run is detached: it continues after a dropped connection.
#
#   deploy/tpu_pod.sh create NAME --zone ZONE --type v5litepod-16 [--spot] [--slices N]
#   deploy/tpu_pod.sh start  NAME --zone ZONE [--slices N] [--delete-when-done] -- --output gs://BUCKET/RUN [flags]
#   deploy/tpu_pod.sh status NAME --zone ZONE [--slices N]     state of the slice and of each worker's run
#   deploy/tpu_pod.sh logs   NAME --zone ZONE [--slices N] [--worker N] [--follow]     the end of the first worker's log
#   deploy/tpu_pod.sh stop   NAME --zone ZONE [--slices N]     saves a checkpoint and ends the run; the slice remains
#   deploy/tpu_pod.sh delete NAME --zone ZONE [--slices N]     deletes the slice, which ends its billing
#
# `start` copies this repository to every worker, installs it there and runs `nalora train --resume auto [flags]`. The
# same command resumes the run. HF_TOKEN, if set here, is copied as a file that only your user can read.
# Needs: gcloud. Written for: image Ubuntu 22.04, Python 3.11 (installed by uv), jax[tpu] 0.10.2. Not run on hardware.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

usage() {
  sed -n '4,9s/^#   //p' "$0" >&2
  exit 2
}

fail() { # MESSAGE
  echo "error: $1" >&2
  exit 2
}

# ------------------------------------------------------------------ arguments

(($# >= 2)) || usage
action=$1 name=$2
shift 2
place=() flags=() zone='' type='' spot='' worker=0 follow='' slices=1 delete_when_done='' deletes='' folder=''
while (($#)); do
  case $1 in
    --zone | --type | --slices | --worker) (($# > 1)) || fail "$1: expected a value" ;;
  esac
  case $1 in
    --zone) zone=$2 place=(--zone "$2") && shift ;;
    --type) type=$2 && shift ;;
    --slices) slices=$2 && shift ;;
    --worker) worker=$2 && shift ;;
    --spot) spot=--spot ;;
    --follow) follow=-F ;;
    --delete-when-done) delete_when_done=yes ;;
    --) shift && flags=("$@") && break ;;
    *) fail "$1: expected an option of $action; flags of nalora train follow --" ;;
  esac
  shift
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices: expected a number, found $slices"
[[ -n $zone ]] || fail "--zone: expected the zone of the slice, e.g. --zone us-west4-a"

nodes=("$name") # several slices of one queued resource are called NAME-0, NAME-1, ...
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# ------------------------------------------------------------------ gcloud

tpu() { gcloud compute tpus tpu-vm "$@" "${place[@]}"; }
queue() { gcloud compute tpus queued-resources "$@" "${place[@]}"; }

on_workers() { # COMMAND on all workers of all slices at once; fails if one of them fails
  local node pid pids=() failed=0
  for node in "${nodes[@]}"; do
    tpu ssh "$node" --worker=all --command "$1" </dev/null &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

worker_states() { # a line "HOST: STATE" for each worker, followed by the end of its log
  on_workers 'f=nalora-launch/worker.sh; if test -e $f; then bash $f status; else echo "worker: not started"; fi'
}

command_for() { # ACTION on this slice
  local words="deploy/tpu_pod.sh $1 $name --zone $zone"
  ((slices == 1)) || words+=" --slices $slices"
  echo "$words"
}

bills() {
  echo "The slice is billed until it is deleted: $(command_for delete)"
}

slice_state() { # ACTIVE: the workers can be reached
  queue describe "$name" --format 'value(state.state)' 2>/dev/null && return
  tpu describe "${nodes[0]}" --format 'value(state)' >/dev/null || # made without a queued resource
    fail "$name: expected a slice in $zone, found none; create it first"
  echo ACTIVE
}

# ------------------------------------------------------------------ actions

create() {
  local runtime what=(--node-id "$name")
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--type: expected v5litepod-N, v5p-N or v6e-N, found '$type'" ;;
  esac
  ((slices == 1)) || what=(--node-count "$slices" --node-prefix "$name")
  queue create "$name" "${what[@]}" --accelerator-type "$type" --runtime-version "$runtime" ${spot:+"$spot"}
  echo "Wait until its state is ACTIVE: $(command_for status)"
  bills
}

# Flags that all workers need before anything is copied.
check_flags() {
  local previous='' output='' resume=''
  for word in ${flags[@]+"${flags[@]}"}; do
    case $previous in --output) output=$word ;; esac
    case $word in
      --output=*) output=${word#*=} ;;
      --resume | --resume=* | --no-resume) resume=yes ;;
    esac
    previous=$word
  done
  [[ $output == *://* || $output == /* ]] ||
    fail "--output: expected gs://BUCKET/RUN or a folder that all workers mount, found '$output'"
  [[ -n $resume ]] || flags+=(--resume auto)
}

# A folder with all that a worker needs, readable by this user alone.
pack() { # FOLDER
  mkdir -m 700 "$1"
  cp "$here/tpu_worker.sh" "$1/worker.sh"
  tar --exclude __pycache__ -czf "$1/source.tar.gz" -C "$here/.." pyproject.toml README.md LICENSE NOTICE nalora_jax
  printf '%s\0' "${flags[@]}" >"$1/flags"
  if [[ -n ${HF_TOKEN:-} ]]; then
    (umask 077 && printf '%s' "$HF_TOKEN" >"$1/hf_token")
  fi
}

start() {
  local state node running workers
  check_flags
  state=$(slice_state)
  [[ $state == ACTIVE ]] || fail "$name: expected the state ACTIVE, found $state; wait: $(command_for status)"
  trap 'rm -rf "$folder"; [[ -n $deletes ]] || bills' EXIT # also after a failure: a slice never bills silently
  state=$(worker_states)
  folder=$(mktemp -d)
  running=$(grep -c '^[^ ]*: running' <<<"$state" || true)
  workers=$(grep -c '^[^ ]*: ' <<<"$state" || true)
  if ((running)); then
    echo "$state"
    ((running == workers)) || fail "$name: $running of $workers workers run; stop it first: $(command_for stop)"
    echo "already running: left as it is"
    return
  fi
  pack "$folder/nalora-launch"
  for node in "${nodes[@]}"; do
    tpu scp --recurse "$folder/nalora-launch" "$node:" --worker=all
  done
  on_workers 'bash nalora-launch/worker.sh start'
  if [[ -n $delete_when_done ]]; then
    tpu ssh "${nodes[0]}" --worker=0 --command "bash nalora-launch/worker.sh delete-when-done $name $zone" </dev/null
    deletes=yes
  fi
  echo "Log: $(command_for logs)"
}

status() {
  local state
  state=$(slice_state)
  echo "$state"
  if [[ $state != ACTIVE ]]; then
    echo "The workers can be reached, and are billed, while the state is ACTIVE."
    return
  fi
  trap bills EXIT
  worker_states
}

stop() {
  trap bills EXIT
  on_workers 'bash nalora-launch/worker.sh stop'
}

delete() {
  local node
  if queue describe "$name" >/dev/null 2>&1; then
    queue delete "$name" --force --quiet
  else # made without a queued resource
    for node in "${nodes[@]}"; do tpu delete "$node" --quiet; done
  fi
}

{ # bash reads this group as a whole: the file may change while a command runs
  case $action in
    create) create ;;
    start) start ;;
    status) status ;;
    delete) delete ;;
    logs) tpu ssh "${nodes[0]}" --worker="$worker" --command "tail -n 100 $follow nalora-run/log" ;;
    stop) stop ;;
    *) usage ;;
  esac
  exit
}
