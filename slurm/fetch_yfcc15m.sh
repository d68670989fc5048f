#!/bin/bash
#SBATCH --job-name=fetch_yfcc15m --ntasks=1 --cpus-per-task=16 --mem=32G --time=2-00
#SBATCH --open-mode=append --requeue --signal=B:USR1@60 --output=slurm/logs/%x-%j.log
# Downloads YFCC15M (which of the two: site.env), where nodes reach the network: sbatch slurm/fetch_yfcc15m.sh [FLAGS of python -m data_prep.fetch yfcc15m-clip]
# shellcheck source=slurm/common.sh
source "${SETCLIP_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh" || exit 2
if [[ $YFCC15M == clip ]]; then
    fetch yfcc15m --list "$LISTS/yfcc100m_subset_data.tsv.bz2" --metadata "$LISTS/yfcc100m_dataset.bz2" "$@"
else
    fetch yfcc15m --list "$LISTS/yfcc15m_declip.json" "$@"
fi
