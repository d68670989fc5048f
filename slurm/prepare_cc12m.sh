#!/bin/bash
#SBATCH --job-name=prepare_cc12m --array=0-15 --ntasks=1 --cpus-per-task=16 --mem=32G --time=08:00:00
#SBATCH --open-mode=append --requeue --signal=B:USR1@60 --output=slurm/logs/%x-%A_%a.log
# Packs CC12M into shards: sbatch slurm/prepare_cc12m.sh [FLAGS of python -m data_prep.run cc12m]
# and then one folder of it: sbatch --dependency=afterok:ID --array=0 slurm/prepare_cc12m.sh merge
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
prepare cc12m "$@"
