#!/bin/bash
#SBATCH --job-name=evaluate --nodes=1 --gpus-per-node=1 --ntasks=1 --cpus-per-task=8 --mem=64G --time=04:00:00
#SBATCH --open-mode=append --requeue --signal=B:USR1@60 --output=slurm/logs/%x-%j.log
# Evaluates a model: sbatch slurm/evaluate.sh zeroshot imagenet [FLAGS of python -m eval_suite.zeroshot imagenet]
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
evaluate "$@"
