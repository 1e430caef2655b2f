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
# The project's own questions: 12 facts in many wordings, each with three wrong answers of its category.
# The categories were chosen because the untrained model seldom boxes there: the rise in reward is mostly the format.
questions=.cache/medfacts
"$bin/python" -m alphamed.data.medfacts $questions --levels 1 --facts 12 --copies 20 \
    --categories antidotes signs nutrients >/dev/null
# No step begins after minute 14 of this command; a slow installation still leaves 5 minutes of training.
limit_s=$((825 - SECONDS))
exec "$bin/alphamed" train --config "$config" \
    run.time_limit_s=$((limit_s > 300 ? limit_s : 300)) "$@"
