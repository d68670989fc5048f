#!/bin/bash
#SBATCH --job-name=finetune --nodes=1 --gpus-per-node=8 --exclusive --mem=0 --time=1-00
#SBATCH --open-mode=append --requeue --signal=B:USR1@300 --output=slurm/logs/%x-%j.log
# Fine-tunes for retrieval: sbatch slurm/finetune.sh [RECIPE] --model runs/cc12m --dataset coco [FLAGS of python -m finetune.run]
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
finetune "$@"
