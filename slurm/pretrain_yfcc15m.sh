#!/bin/bash
#SBATCH --job-name=pretrain_yfcc15m --nodes=1 --gpus-per-node=8 --exclusive --mem=0 --time=5-00
#SBATCH --open-mode=append --requeue --signal=B:USR1@300 --output=slurm/logs/%x-%j.log
# Pretrains on YFCC15M (which of the two: site.env): sbatch [--nodes 4] slurm/pretrain_yfcc15m.sh [RECIPE] [FLAGS of python -m pretrain.run yfcc15m-clip]
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
pretrain yfcc15m "$@"
