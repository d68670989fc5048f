#!/bin/bash
# One rank: its log file with a heading, and its exit status for whoever asks who failed first. Started by common.sh through srun.
log=$(printf '%s/rank-%05d.log' "$RANK_LOGS" "$SLURM_PROCID")
host=${SLURMD_NODENAME:-$(hostname)}

# What saves on a signal handles it once its imports are done; until then it must not die of it, and its tee never.
# What can be killed at any time dies of SIGTERM at once.
if [[ ${SAVES:-} ]]; then trap '' TERM USR1; else trap : TERM USR1; fi

echo "=== $HEADING; rank $SLURM_PROCID of $SLURM_NTASKS on $host, $(date -u '+%F %T') UTC: $*" >>"$log"
if ((SLURM_PROCID == 0)); then # rank 0 speaks: in the job's log too
    "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
else
    "$@" >>"$log" 2>&1
    status=$?
fi
echo "=== rank $SLURM_PROCID on $host ended with status $status, $(date -u '+%F %T') UTC" >>"$log"
if ((status)); then
    (set -o noclobber && echo "$status $SLURM_PROCID $host" >"$RANK_LOGS/failed") 2>/dev/null
fi
exit "$status"
