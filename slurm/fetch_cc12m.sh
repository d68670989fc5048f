#!/bin/bash
#SBATCH --job-name=fetch_cc12m --ntasks=1 --cpus-per-task=16 --mem=32G --time=2-00
#SBATCH --open-mode=append --requeue --signal=B:USR1@60 --output=slurm/logs/%x-%j.log
# Downloads CC12M, where nodes reach the network: sbatch slurm/fetch_cc12m.sh [FLAGS of python -m data_prep.fetch cc12m]
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
fetch cc12m --list "$LISTS/cc12m.tsv" "$@"
