#!/usr/bin/env bash
# Runs on every host of a TPU slice; tpu_pod.sh sends it there and calls it.  It keeps one command
# going by itself, so that a broken ssh connection does not end it, and gcloud's next attempt does
# not start it twice.
#
#   tpu_worker.sh install     befm_jax from ~/befm_jax into the environment ~/befm_env
#   tpu_worker.sh start CMD   in ~/befm_jax; nothing happens while a command is running
#   tpu_worker.sh follow      the log of the command, until it ends
#   tpu_worker.sh wait        for its end; prints "exit CODE HOST", CODE may be `lost` or `stopped`
#   tpu_worker.sh stop        SIGTERM: it saves its state and ends
set -euo pipefail

run=$HOME/befm_run
mkdir -p "$run"
verb=${1:?a verb}
shift

case $verb in
    install)
        # The images' own Python is older than befm_jax needs.
        python3 -m pip install --quiet --user uv
        [ -x "$HOME/befm_env/bin/python" ] || python3 -m uv venv --quiet --python 3.12 "$HOME/befm_env"
        python3 -m uv pip install --quiet --python "$HOME/befm_env/bin/python" -e "$HOME/befm_jax[tpu]"
        ;;
    start)
        # The lock is held by whoever has file 9 open: from here on by the command itself.
        exec 9>"$run/lock"
        flock --nonblock 9 || { echo "$(hostname): already running" && exit 0; }
        rm -f "$run/exit" "$run/stopped"
        [ ! -e "$run/log" ] || mv "$run/log" "$run/log.before"
        setsid bash "$0" supervise "$@" </dev/null >"$run/log" 2>&1 &
        ;;
    supervise)
        echo $$ >"$run/group"
        cd "$HOME/befm_jax"
        export PATH=$HOME/befm_env/bin:$PATH
        if [ -e "$HOME/befm_environment" ]; then
            set -a
            # shellcheck source=/dev/null
            . "$HOME/befm_environment"
            set +a
        fi
        trap : TERM # for the command, which is in the same process group; this shell outlives it
        code=0
        "$@" || code=$?
        echo "$code" >"$run/exit"
        ;;
    follow)
        tail -n 200 -F "$run/log" 2>/dev/null &
        flock "$run/lock" true
        sleep 1 # for the last lines
        kill $!
        ;;
    wait)
        flock "$run/lock" true
        code=$(cat "$run/exit" 2>/dev/null || echo lost)
        if [ -e "$run/stopped" ] && [ "$code" != 0 ]; then code=stopped; fi
        echo "exit $code $(hostname)"
        ;;
    stop)
        flock --nonblock "$run/lock" true && echo "$(hostname): nothing is running" && exit 0
        touch "$run/stopped"
        kill -TERM -- "-$(cat "$run/group")"
        ;;
    *)
        echo "tpu_worker.sh: unknown verb $verb" >&2
        exit 2
        ;;
esac
