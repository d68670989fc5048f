#!/bin/bash
# Submits all stages of a corpus as one chain of jobs, each after the one before; run again, only what is neither done nor queued.
#
#     slurm/pipeline.sh cc12m                # download, preparation, language model, pretraining, fine-tuning, evaluation
#     PRETRAIN_SBATCH=--nodes=4 slurm/pipeline.sh cc12m
#     slurm/pipeline.sh cc12m --finetune-data coco     # folders or names, separated by spaces, for FINETUNE_DATA of site.env
#     slurm/pipeline.sh cc12m --dry-run                # says what it would submit
#
# Corpora: cc3m, cc12m, yfcc15m. What the chain does, and options for its stages: slurm/site.env. `python -m setclip.jobs` shows it.
set -euo pipefail
SETCLIP_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export SETCLIP_HOME
cd "$SETCLIP_HOME"
# shellcheck source=slurm/site.env
source "${SETCLIP_SITE:-slurm/site.env}"
: "${LOGIN_PYTHON:=$PYTHON}"

name=${1:-} dry='' wrong=''
(($# == 0)) || shift
words=("$@")
while (($#)); do
    case $1 in
    --dry-run) dry=1 ;;
    --finetune-data=*) FINETUNE_DATA=${1#*=} ;;
    --finetune-data)
        if (($# > 1)) && [[ $2 != -* ]]; then
            FINETUNE_DATA=$2
            shift
        else
            wrong=$1
        fi
        ;;
    *) wrong=$1 ;;
    esac
    shift
done
if [[ ! -e slurm/pretrain_$name.sh || -z $name || $wrong ]]; then
    echo "error: expected a corpus (cc3m, cc12m, yfcc15m) and perhaps --finetune-data NAMES and --dry-run," \
        "found: ${name:-nothing} ${words[*]:-}" >&2
    exit 2
fi
corpus=$name
[[ $name == yfcc15m ]] && corpus=yfcc15m-$YFCC15M
data=$SETCLIP_DATA/$corpus run=$RUNS/$corpus
chain=slurm/logs/chain-$name

# --- the plan: stage, a tab, and the place that shows whether it is done

stages=(fetch prepare merge)
if [[ $LLM_MODEL ]]; then
    stages+=(parse_llm parse_llm_merge describe describe_merge)
else
    echo "note: no language model (LLM_MODEL in slurm/site.env): objects are the parser's, and there are no descriptions"
fi
stages+=(pretrain)

declare -A tuning_data=() # stage: the flag that names its data
tuned=()                  # evaluations of what was fine-tuned, as those of EVALUATIONS
is_of_held_out() { # Whether a fine-tuning may report on pictures that it holds out, which are no split to evaluate again
    local said=" ${FINETUNE_ARGS:-} "
    said=${said//=/ } said=${said//_/-}
    [[ $said == *" --hold-out "[1-9]* && ($said != *" --test"* || $said == *" --test-split none "*) ]]
}
read -r -a words <<<"$FINETUNE_DATA"
for word in ${words[@]+"${words[@]}"}; do
    folder=${word%/} flag=--data
    [[ $word == */* ]] || folder=$SETCLIP_DATA/$word flag=--dataset
    stage=finetune:${folder##*/}
    if [[ ! -e $folder/manifest.json && $folder != "$data" ]]; then
        printf '%-28s left out: no manifest.json in %s (docs/data.md prepares it; FINETUNE_DATA in slurm/site.env)\n' "$stage" "$folder"
        continue
    fi
    if [[ ${tuning_data[$stage]:-} ]]; then
        echo "error: expected data sets with different names, found two named ${folder##*/}: $FINETUNE_DATA; give one another name" >&2
        exit 2
    fi
    stages+=("$stage")
    tuning_data[$stage]="$flag $word"
    # Several seeds make several models, which the run itself evaluates.
    [[ ${FINETUNE_ARGS:-} == *--seeds* ]] && continue
    if is_of_held_out; then
        printf '%-28s left out: with --hold-out its figures are those of %s/results.json\n' \
            "evaluate:finetuned-${folder##*/}" "$run-${folder##*/}"
        continue
    fi
    tuned+=("$stage")
done
IFS=';' read -r -a evaluations <<<"$EVALUATIONS"
results=()
for words in ${evaluations[@]+"${evaluations[@]}"}; do
    read -r -a words <<<"$words"
    ((${#words[@]})) || continue
    stage=evaluate:${words[0]}${words[1]:+-${words[1]}}
    if [[ " ${stages[*]} " == *" $stage "* ]]; then
        echo "error: expected evaluations with different names, found two named ${stage#*:}: $EVALUATIONS; leave one out, or do it" \
            "by hand with another --out" >&2
        exit 2
    fi
    stages+=("$stage")
    results+=("$run/results/${words[0]}${words[1]:+-${words[1]}}.json")
done
for stage in ${tuned[@]+"${tuned[@]}"}; do
    stages+=("evaluate:finetuned-${stage#*:}")
done
tuned_run() { # STAGE: of a fine-tuning, or of its evaluation
    local of=${1#*:}
    echo "$run-${of#finetuned-}"
}
plan=$chain.tsv
if [[ $dry ]]; then # the chain that was submitted stays what is shown
    plan=$(mktemp)
    trap 'rm -f "$plan"' EXIT
fi
{
    evaluation=0
    for stage in "${stages[@]}"; do
        case $stage in
        fetch) place=$RAW/$corpus ;;
        pretrain) place=$run ;;
        finetune:*) place=$(tuned_run "$stage") ;;
        evaluate:finetuned-*) place=$(tuned_run "$stage")/results/retrieval.json ;;
        evaluate:*) place=${results[evaluation++]} ;;
        *) place=$data ;;
        esac
        printf '%s\t%s\n' "$stage" "$place"
    done
} >"$plan"

# --- the jobs

declare -A state=() job=()
while IFS=$'\t' read -r stage found id; do
    state[$stage]=$found job[$stage]=$id
done < <("$LOGIN_PYTHON" -m setclip.jobs "$name" --plan "$plan" --plain True)
((${#state[@]})) || exit 2

after= # the job that the next one waits for
submit() { # STAGE SETTINGS OPTIONS... -- SCRIPT ARGUMENTS...
    local stage=$1 prefix=$2 options=() words id variable
    shift 2
    case ${state[$stage]} in
    done)
        printf '%-28s done\n' "$stage"
        after=
        return
        ;;
    running | waiting)
        printf '%-28s job %-8s %s already\n' "$stage" "${job[$stage]}" "${state[$stage]}"
        after=${job[$stage]}
        return
        ;;
    esac
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    variable=${prefix}_SBATCH
    read -r -a words <<<"${!variable:-}"
    options+=(${words[@]+"${words[@]}"})
    [[ -z $after ]] || options+=("--dependency=afterok:$after")
    variable=${prefix}_ARGS
    read -r -a words <<<"${!variable:-}"
    if [[ $dry ]]; then
        echo "sbatch --kill-on-invalid-dep=yes ${options[*]} $* ${words[*]:-}"
        after=$stage
        return
    fi
    id=$(sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" "$@" ${words[@]+"${words[@]}"})
    id=${id%%;*}
    printf '%s\t%s\n' "$stage" "$id" >>"$chain.jobs"
    printf '%-28s job %-8s %s\n' "$stage" "$id" "${after:+after $after}"
    after=$id
}

cpu_job=()
[[ -z $CPU_PARTITION ]] || cpu_job=("--partition=$CPU_PARTITION")
no_gpu=(--gpus-per-node=0)
gpu_job=()
[[ $SETCLIP_DEVICE != cpu ]] || gpu_job=("${no_gpu[@]}")

declare -A tuning=() # stage: its job
evaluation=0
for stage in "${stages[@]}"; do
    case $stage in
    fetch) submit fetch FETCH "${cpu_job[@]}" -- "slurm/fetch_$name.sh" ;;
    prepare) submit prepare PREPARE "${cpu_job[@]}" -- "slurm/prepare_$name.sh" ;;
    merge) submit merge MERGE "${cpu_job[@]}" --array=0 "--job-name=merge_$name" -- "slurm/prepare_$name.sh" merge ;;
    parse_llm | describe) submit "$stage" "${stage^^}" -- "slurm/${stage}_$name.sh" ;;
    parse_llm_merge | describe_merge)
        script=${stage%_merge}
        submit "$stage" MERGE "${cpu_job[@]}" "${no_gpu[@]}" --array=0 "--job-name=${stage}_$name" -- "slurm/${script}_$name.sh" merge
        ;;
    pretrain)
        submit pretrain PRETRAIN "${gpu_job[@]}" -- "slurm/pretrain_$name.sh"
        trained=$after
        ;;
    finetune:*)
        after=$trained
        read -r -a words <<<"${tuning_data[$stage]}"
        submit "$stage" FINETUNE "${gpu_job[@]}" "--job-name=finetune_$name" -- slurm/finetune.sh "$FINETUNE_RECIPE" \
            --model "$run" "${words[@]}" --out "$(tuned_run "$stage")"
        tuning[$stage]=$after
        ;;
    evaluate:finetuned-*)
        after=${tuning[finetune:${stage#evaluate:finetuned-}]}
        # On the data that its results are of: they name place and split.
        submit "$stage" EVALUATE "${gpu_job[@]}" "--job-name=evaluate_$name" -- slurm/evaluate.sh retrieval \
            --checkpoint "$(tuned_run "$stage")" --out "$(tuned_run "$stage")/results/retrieval.json"
        ;;
    evaluate:*)
        after=$trained # each waits for the training alone
        read -r -a words <<<"${evaluations[evaluation]}"
        submit "$stage" EVALUATE "${gpu_job[@]}" "--job-name=evaluate_$name" -- slurm/evaluate.sh "${words[@]}" \
            --checkpoint "$run" --out "${results[evaluation++]}"
        ;;
    esac
done
[[ $dry ]] || echo "state: $LOGIN_PYTHON -m setclip.jobs $name"
