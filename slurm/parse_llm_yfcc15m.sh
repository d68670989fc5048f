#!/bin/bash
#SBATCH --job-name=parse_llm_yfcc15m --array=0-15 --ntasks=1 --cpus-per-task=8 --mem=64G --gpus-per-node=1 --time=1-00
#SBATCH --open-mode=append --requeue --signal=B:USR1@60 --output=slurm/logs/%x-%A_%a.log
# Has a language model name the objects of YFCC15M (which of the two: site.env), an engine a task: sbatch slurm/parse_llm_yfcc15m.sh [FLAGS of python -m data_prep.parse_llm]
# and then writes them: sbatch --dependency=afterok:ID --array=0 --gpus-per-node=0 slurm/parse_llm_yfcc15m.sh merge
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
ask parse_llm yfcc15m "$@"
