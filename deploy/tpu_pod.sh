#!/usr/bin/env bash
# A run on every worker of a Cloud TPU pod slice (or of a single TPU VM), started, stopped and taken up by one command:
#
#   deploy/tpu_pod.sh SLICE ZONE BUCKET OUTPUT [flags of `nalora train`]
#   export NALORA_SOURCE=git+https://HOST/OWNER/nalora_jax     # what pip installs on the workers
#   deploy/tpu_pod.sh my-slice us-east5-b my-bucket runs/llama --model meta-llama/Llama-3.1-8B --mesh.data 1 --mesh.fsdp -1
#
# SLICE exists (see docs/deploy.md) with the image v2-alpha-tpuv6e or v2-alpha-tpuv5-lite. BUCKET is mounted with gcsfuse
# on every worker, because the workers share the output folder. The same command again takes the run up where it was.
# Written for: Python 3.11, jax[tpu] 0.10.2, gcsfuse 2 or newer. Not run on hardware.
set -euo pipefail

if (($# < 4)); then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
slice=$1 zone=$2 bucket=$3 output=$4
shift 4
mount=/mnt/nalora
archive=${NALORA_SOURCE:?what pip installs on the workers, e.g. git+https://HOST/OWNER/nalora_jax}

flags=(train --output "$mount/$output" --resume auto "$@")
printf -v command '%q ' "${flags[@]}"

# What each worker does. Renames of folders have to be atomic for checkpoints: use a bucket with a hierarchical namespace.
read -r -d '' worker <<WORKER || true
set -euo pipefail
sudo mkdir -p $mount
mountpoint -q $mount || { sudo chown "\$USER" $mount; gcsfuse --implicit-dirs --rename-dir-limit=200000 $bucket $mount; }
test -x "\$HOME/nalora/bin/nalora" || {
  python3.11 -m venv "\$HOME/nalora"
  "\$HOME/nalora/bin/pip" install --quiet 'jax[tpu]==0.10.2' 'nalora_jax[tpu] @ $archive'
}
exec "\$HOME/nalora/bin/nalora" $command
WORKER

exec gcloud compute tpus tpu-vm ssh "$slice" --zone "$zone" --worker=all --command "$worker"
