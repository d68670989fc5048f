#!/bin/bash
#SBATCH --job-name=describe_cc12m --array=0-3 --ntasks=1 --cpus-per-task=8 --mem=64G --gpus-per-node=1 --time=12:00:00
#SBATCH --open-mode=append --requeue --signal=B:USR1@60 --output=slurm/logs/%x-%A_%a.log
# Has a language model describe objects of CC12M, an engine a task: sbatch slurm/describe_cc12m.sh [FLAGS of python -m data_prep.describe]
# and then writes descriptions.parquet: sbatch --dependency=afterok:ID --array=0 --gpus-per-node=0 slurm/describe_cc12m.sh merge
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
ask describe cc12m "$@"
