#!/usr/bin/env bash
# GRPO on medical questions on a laptop: environment, model, training, evaluation before and after, report.
#   bash examples/quickstart.sh [key=value ...]        for instance run.name=second optimizer.lr=5e-5
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${ALPHAMED_BIN:-} config=$here/train_smollm2_cpu.yaml
if [ -z "$bin" ]; then                  # else a container image: installed and read-only, files go to the current folder
    bash "$here/setup_env.sh"
    cd "$here/.."
    bin=.venv/bin config=examples/train_smollm2_cpu.yaml
fi
# The project's own questions: 12 facts in many wordings, each with the right answers of three others as wrong ones.
# The categories were chosen because the untrained model seldom boxes there: the rise in reward is mostly the format.
questions=.cache/medfacts
"$bin/python" -m alphamed.lab.datasets.medfacts $questions --levels 1 --facts 12 --copies 20 \
    --categories antidotes signs nutrients >/dev/null
# No step begins after minute 14 of this command; a slow installation still leaves 5 minutes of training.
limit_s=$((825 - SECONDS))
limit_s=$((limit_s > 300 ? limit_s : 300))
# On a slow or busy machine each evaluation takes an eighth of that, and steps shrink until twelve fit: fewer questions, and the
# run prints how many are left out.
echo "quickstart: the last step begins within $((limit_s / 60)) min; the run lies in runs/quickstart unless run.name says otherwise"
exec "$bin/alphamed" train --config "$config" run.time_limit_s=$limit_s run.min_steps=12 \
    evaluation.time_limit_s=$((limit_s / 8)) "$@"
