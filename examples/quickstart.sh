#!/usr/bin/env bash
# Teaches medical facts by reward alone, on a laptop: environment, model, supervised training on the answer format, GRPO,
# evaluation before and after, report.
#   bash examples/quickstart.sh [--control] [key=value ...]      for example run.name=second optimizer.lr=5e-5
# --control trains on shuffled keys. Accuracy on the true keys must then stay at chance.
set -euo pipefail
settings=()
for argument in "$@"; do
    case $argument in
        --control) settings=(run.name=quickstart-control data.answer_keys=shuffled ${settings[@]+"${settings[@]}"}) ;;
        [a-z]*=*) settings+=("$argument") ;;
        *) echo "quickstart: $argument: it takes --control and settings as key=value" >&2; exit 2 ;;
    esac
done
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${ALPHAMED_BIN:-} configs=$here
if [ -z "$bin" ]; then                  # otherwise in a container image: read-only, so files go to the current folder
    bash "$here/setup_env.sh"
    cd "$here/.."
    bin=.venv/bin configs=examples
fi
# Questions about 12 facts in many wordings. Wrong options are right answers of the other facts, so that a policy that does not
# read the question scores 25%. These categories and this seed have short answers, which make short steps.
questions=.cache/medfacts
"$bin/python" -m alphamed.lab.datasets.medfacts $questions --levels 1 --facts 12 --copies 20 --seed 3 \
    --categories vectors cell_products viruses >/dev/null
# Supervised training on the answer format: name any one of the options and its letter. It teaches no fact. Later runs reuse it.
lesson=runs/quickstart-lesson
"$bin/python" -m alphamed.lab.datasets.form $questions/lesson.jsonl --questions $questions/train.jsonl \
    --response ' {text} \boxed{{letter}}' >/dev/null
if [ -f $lesson/config.yaml ] && ! "$bin/alphamed" sft --config "$configs/sft_smollm2_cpu.yaml" --check >/dev/null; then
    echo "quickstart: where $lesson is of other questions or settings, remove it and give this run another run.name" >&2
    exit 2
fi
[ -f $lesson/finished.json ] || "$bin/alphamed" sft --config "$configs/sft_smollm2_cpu.yaml"
# No step begins after minute 14 of this command. A slow installation still leaves 5 minutes of training.
limit_s=$((825 - SECONDS))
limit_s=$((limit_s > 300 ? limit_s : 300))
# On a slow or busy machine, each evaluation takes at most an eighth of that, and steps shrink until twelve fit. Both then ask
# fewer questions, and the run prints how many are left out.
echo "quickstart: the last step begins within $((limit_s / 60)) min; the run directory is runs/quickstart unless run.name is set"
exec "$bin/alphamed" train --config "$configs/train_smollm2_cpu.yaml" run.time_limit_s=$limit_s run.min_steps=12 \
    evaluation.time_limit_s=$((limit_s / 8)) ${settings[@]+"${settings[@]}"}
