# What the jobs share: environment, preflight, ranks, signals, requeueing, logs. Sourced by the scripts beside it, within a job.
# shellcheck shell=bash
#
# A stage is: begin; check (preflight); launch (srun); finish, which decides whether the job is done, has failed, or is queued again.
# Exit statuses of the commands: docs/pretraining.md; what follows from them: docs/cluster.md.

set -uo pipefail
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: expected a Slurm job, found none; submit it: sbatch $0 (or run the command itself, python -m …)" >&2
    exit 2
fi
SETCLIP_HOME=$(cd "${SETCLIP_HOME:-$SLURM_SUBMIT_DIR}" && pwd) || exit 2
cd "$SETCLIP_HOME" || exit 2
# shellcheck source=slurm/site.env
source "${SETCLIP_SITE:-slurm/site.env}"

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
nodes=$SLURM_JOB_NUM_NODES
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
export RANK_LOGS=slurm/logs/$SLURM_JOB_NAME-$job ATTEMPT=$attempt
read -r -a python <<<"$CONTAINER"
python+=("$PYTHON")

is_cpu=
[[ $SETCLIP_DEVICE == cpu ]] && is_cpu=1
gpus=${SLURM_GPUS_ON_NODE:-0}

# --- begin and end

begin() { # COMMAND...: the first line of the log, and the check that the job does not turn in circles
    local commit
    mkdir -p "$RANK_LOGS"
    commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
    git diff --quiet HEAD 2>/dev/null || commit+=+changes
    export HEADING="$SLURM_JOB_NAME, job $job, attempt $attempt, on $SLURM_JOB_NODELIST, commit $commit"
    echo "=== $HEADING, $(date -u '+%F %T') UTC: $*"
    if [[ ${SBATCH_PARTITION:-$SLURM_JOB_PARTITION} != "$SLURM_JOB_PARTITION" ]]; then
        echo "note: this is partition $SLURM_JOB_PARTITION; site.env names $SBATCH_PARTITION (source it before sbatch)"
    fi
    ((attempt > 1)) || : >"$RANK_LOGS/begun"
    trap 'asked=$((asked + 1)); stop_ranks' USR1 TERM
}

count_attempt() { # Notes how far the stage is; ends the job after two attempts that brought nothing.
    note_progress
    give_up_without_progress 3
}

note_progress() {
    local now
    now=$(progress)
    echo "${now:-nothing}" >>"$RANK_LOGS/attempts" # a line an attempt, also where there is nothing yet
}

give_up_without_progress() { # NUMBER: of equal values of progress in a row that are too many
    local last
    last=$(tail -n "$1" "$RANK_LOGS/attempts")
    if (($(wc -l <<<"$last") == $1)) && (($(sort -u <<<"$last" | wc -l) == 1)); then
        rm "$RANK_LOGS/attempts" # whoever mends the reason may requeue the job by hand
        echo "error: expected progress, found two attempts that began and ended at ${last##*$'\n'}; the job is not queued again" >&2
        end 1
    fi
}

end() { # STATUS
    echo "=== ended with status $1 in attempt $attempt after $SECONDS s"
    exit "$1"
}

progress() { # How far the stage is, as text; most stages have a better one
    echo nowhere
}

# --- preflight and ranks

check() { # FLAGS of setclip.preflight: on each node once, before anything is built
    timeout 150 srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task=1 \
        "${python[@]}" -m setclip.preflight --min-free-gb "$MIN_FREE_GB" "$@"
    local status=$?
    ((status == 0)) && return
    echo "error: the preflight failed with status $status; nothing was started" >&2
    end 2
}

gpu_check() { # As many GPUs on each node as Slurm gave; --gpus 0 is an error unless this is a machine without
    [[ $is_cpu ]] || echo "--gpus $gpus"
}

ranks_per_node() { # On CPUs --ntasks-per-node says it, or --ntasks, which keeps the number of ranks on any number of nodes
    local tasks=${SLURM_NTASKS:-$nodes}
    if [[ ! $is_cpu ]]; then
        echo "$((gpus > 0 ? gpus : 1))"
    else
        echo "${SLURM_NTASKS_PER_NODE:-$((tasks > nodes ? tasks / nodes : 1))}"
    fi
}

asked=0 # signals that have come
ranks=  # srun's process

launch() { # RANKS-PER-NODE COMMAND...: runs it under srun; returns the status of the rank that failed first
    local number=$1 status=0 found seen
    shift
    local cpus=$((SLURM_CPUS_ON_NODE / number))
    if [[ $is_cpu ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}; fi
    rm -f "$RANK_LOGS/failed"
    ((asked)) && return 75
    srun --nodes="$nodes" --ntasks=$((number * nodes)) --ntasks-per-node="$number" --cpus-per-task=$((cpus > 0 ? cpus : 1)) \
        --kill-on-bad-exit=1 bash slurm/rank.sh "$@" &
    ranks=$!
    while true; do # a signal ends `wait`, not srun
        seen=$asked
        wait "$ranks"
        found=$?
        ((found == 127)) || status=$found
        ((seen == asked)) && break
    done
    ranks=
    if ((status)) && [[ -s $RANK_LOGS/failed ]]; then
        local rank node
        read -r status rank node <"$RANK_LOGS/failed"
        if ((rank > 0 && status != 75)); then
            echo "=== rank $rank on $node ended first, with status $status; its last lines ($RANK_LOGS):" >&2
            tail -n 40 "$(printf '%s/rank-%05d.log' "$RANK_LOGS" "$rank")" | tac | sed '/; rank [0-9]* of /q' | tac | tail -n 15 >&2
        fi
    fi
    return "$status"
}

stop_ranks() { # On a signal to the batch script: the ranks save and end. Repeated, since one that comes during imports is lost.
    [[ $ranks ]] || return 0
    echo "=== asked to stop (time limit, preemption, or by hand)"
    local how=TERM
    [[ ${SAVES:-} ]] && how=USR1
    ((asked > 1)) || while kill -"$how" "$ranks" 2>/dev/null; do sleep 3; done &
}

# --- what follows from a status

finish() { # STATUS
    case $1 in
    0) end 0 ;;
    75) again 75 "it was asked to stop, and has saved" ;;
    70) again 70 "a rank hung" ;;
    69) again 69 "a server did not answer" ;;
    129 | 1[3-9][0-9]) again "$1" "a rank was ended by signal $(($1 - 128))" ;;
    2) end 2 ;; # input or settings do not fit: the same again would end the same
    *)
        local silent
        silent=$(silent_nodes)
        [[ -z $silent ]] || again "$1" "no answer from $silent"
        end "$1"
        ;;
    esac
}

again() { # STATUS REASON: queues the job again, unless somebody else has ended it or it makes no progress
    local state
    state=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
    if [[ $state != JobState=RUNNING ]]; then # cancelled, preempted, requeued by hand, …
        echo "=== not queued again by itself: Slurm says $state"
        end "$1"
    fi
    note_progress
    give_up_without_progress 3
    sed -i '$d' "$RANK_LOGS/attempts"
    echo "=== $2; the job is queued again"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        echo "error: it could not be queued again (--no-requeue?); submit it again, and it goes on" >&2
        end "$1"
    fi
    # shellcheck disable=SC2064
    trap "exit $1" TERM
    sleep 120 & # Slurm ends this attempt
    wait $!
    end "$1"
}

silent_nodes() { # Nodes of this job on which nothing can be started any more
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        timeout -k 1 20 srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --quiet true 2>/dev/null || echo "$node" &
    done
    wait
}

# --- the stages

corpus() { # NAME: as data_prep and pretrain call it
    if [[ $1 == yfcc15m ]]; then echo "yfcc15m-$YFCC15M"; else echo "$1"; fi
}

fetch() { # NAME FLAGS...
    local name
    name=$(corpus "$1")
    progress() { find "$RAW/$name" -name '*_stats.json' 2>/dev/null | wc -l; }
    stage 1 --out "$RAW/$name" -- -m data_prep.fetch "$name" --out "$RAW/$name" "${@:2}"
}

prepare() { # NAME FLAGS...: one element of the array; or NAME merge FLAGS...
    local name folder
    name=$(corpus "$1")
    folder=$SETCLIP_DATA/$name
    progress() { find "$folder/.parts" -maxdepth 1 -type d -name '[0-9]*' 2>/dev/null | wc -l; }
    if [[ ${2:-} == merge ]]; then
        stage 1 --out "$folder" -- -m data_prep.merge "$folder" "${@:3}"
    else
        stage 1 --out "$folder" -- -m data_prep.run "$name" --tars "$RAW/$name" --out "$folder" "${@:2}"
    fi
}

ask() { # COMMAND NAME FLAGS...: a language model, one engine a task; or COMMAND NAME merge FLAGS...
    local folder model=() more=() flags=()
    folder=$SETCLIP_DATA/$(corpus "$2")
    progress() { find "$folder/llm" -name answers.jsonl -exec cat {} + 2>/dev/null | wc -l; }
    [[ -z $LLM_MODEL ]] || model=(--model "$LLM_MODEL")
    if [[ ${3:-} == merge ]]; then
        more=(--merge True "${@:4}")
    else
        more=("${@:3}")
        ((gpus == 0)) || flags=(--gpus "$gpus")
    fi
    stage 1 --shards "$folder" --out "$folder" "${flags[@]}" -- -m "data_prep.$1" "$folder" "${model[@]}" "${more[@]}"
}

pretrain() { # NAME [RECIPE] FLAGS...: goes on where there is a checkpoint
    local recipe flags more=()
    recipe=$(corpus "$1")
    shift
    if [[ ${1:--} != -* ]]; then
        recipe=$1
        shift
    fi
    train pretrain.run "$recipe" --dataset "${recipe%-b16}" --out "$RUNS/$recipe" -- "$@"
}

finetune() { # [RECIPE] FLAGS...: goes on where there is a checkpoint
    local recipe=plain run=finetune
    if [[ ${1:--} != -* ]]; then
        recipe=$1
        [[ $recipe == plain ]] || run=$recipe
        shift
    fi
    train finetune.run "$recipe" --out "$RUNS/$run" -- "$@"
}

train() { # MODULE RECIPE FLAGS-OF-PREFLIGHT... -- FLAGS...
    local module=$1 recipe=$2 found=() more=() run device=()
    shift 2
    while [[ $1 != -- ]]; do
        found+=("$1")
        shift
    done
    shift
    export SAVES=1
    begin "python -m $module $recipe $*"
    # shellcheck disable=SC2046
    check $(gpu_check) "${found[@]}" --run-file "$RANK_LOGS/run" -- "$@"
    run=$(<"$RANK_LOGS/run")
    # Several seeds of a fine-tuning have folders of their own.
    progress() { find "$run" -maxdepth 3 -path '*/checkpoints/step-*' -name 'step-*' 2>/dev/null | sort -V | tail -n 1; }
    count_attempt
    configs() { find "$run" -maxdepth 2 -name config.yaml "$@" 2>/dev/null; }
    if ((attempt > 1)) && [[ $(configs -newer "$RANK_LOGS/begun") ]]; then # begun by this job: its --overwrite is done
        if [[ $(progress) ]]; then more=(--overwrite False --resume True); else more=(--overwrite True); fi
    elif [[ " $*" != *" --overwrite"* ]]; then
        if [[ $(progress) ]]; then more=(--resume True); elif [[ $(configs) ]]; then more=(--overwrite True); fi
    fi
    if [[ $is_cpu ]]; then
        if [[ $module == pretrain.run ]]; then device=(--engine.device cpu); else device=(--device cpu); fi
    fi
    launch "$(ranks_per_node)" "${python[@]}" -m "$module" "$recipe" --out "$run" "${device[@]}" "$@" "${more[@]}"
    finish $?
}

evaluate() { # EVALUATION FLAGS...: zeroshot imagenet, retrieval coco, …
    if (($# == 0)); then
        echo "error: expected an evaluation (zeroshot imagenet, retrieval coco, …), found none" >&2
        exit 2
    fi
    begin "python -m eval_suite.$*"
    # shellcheck disable=SC2046
    check $(gpu_check) --out "$RUNS"
    count_attempt
    launch "$(ranks_per_node)" "${python[@]}" -m "eval_suite.$1" "${@:2}" ${is_cpu:+--device cpu}
    finish $?
}

stage() { # RANKS-PER-NODE FLAGS-OF-PREFLIGHT... -- ARGUMENTS-OF-PYTHON...
    local number=$1 flags=()
    shift
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    begin "python $*"
    check "${flags[@]}"
    count_attempt
    launch "$number" "${python[@]}" "$@"
    finish $?
}
