#!/bin/bash
#SBATCH --job-name=pretrain_cc12m --nodes=1 --gpus-per-node=8 --exclusive --mem=0 --time=4-00
#SBATCH --open-mode=append --requeue --signal=B:USR1@300 --output=slurm/logs/%x-%j.log
# Pretrains on CC12M: sbatch [--nodes 4] slurm/pretrain_cc12m.sh [RECIPE] [FLAGS of python -m pretrain.run cc12m]
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
pretrain cc12m "$@"
