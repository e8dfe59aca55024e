#!/usr/bin/env bash
# Runs one command on every host of a TPU slice, and again after every preemption, until it is done.
#
#   launch/tpu_pod.sh run --name NAME --zone ZONE --type v5p-128 [options] -- CMD ...
#   launch/tpu_pod.sh logs|stop|status|delete --name NAME --zone ZONE [--project P] [--dry-run]
#
#   --spot            cheaper, and may be taken away at any time
#   --slices N        N slices of that type, joined over the data centre network (default 1)
#   --runtime V       software version of the hosts (default: the one for the type)
#   --env-file FILE   lines NAME=value, for example HF_TOKEN=..., set for the command on every host
#   --retries N       how often a command that fails, or loses a process, is run again (default 10)
#   --poll SECONDS    between looks at the state of the slice (default 30)
#   --delete          delete the slice when the command has ended, however it ended
#   --create FLAG     one more flag of `gcloud compute tpus queued-resources create`; repeatable
#   --ssh FLAG        one more flag of its ssh and scp, such as --tunnel-through-iap; repeatable
#   --dry-run         print every command instead of running it
#
# Exit code 0: done.  2: a mistake in the command, not run again.  75: stopped on request, its
# state is saved.  Else: that of the command, after its retries.
set -euo pipefail

say() { echo "tpu_pod.sh: $*" >&2; }
mistake() { say "$*" && exit 2; }

quoted() { # the arguments as one line that a shell reads back as the same arguments
    local word line="" q=\'
    for word in "$@"; do
        case $word in
            "" | *[!A-Za-z0-9_@%+=:,./-]*) word=$q${word//$q/$q\\$q$q}$q ;;
        esac
        line+=" $word"
    done
    echo "${line:1}"
}

step() { # runs a command and shows it; or only shows it
    if $dry_run; then quoted "$@" && return; fi
    echo "+ $(quoted "$@")" >&2
    "$@"
}

# --- what was asked for

verb=${1:-help}
case $verb in
    run | logs | stop | status | delete) shift ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
name="" zone="" project="" type="" runtime="" env_file=""
slices=1 retries=10 poll=30 delete=false dry_run=false
create_flags=() ssh_flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --) shift && break ;;
        --spot) create_flags+=(--spot) && shift && continue ;;
        --delete) delete=true && shift && continue ;;
        --dry-run) dry_run=true && shift && continue ;;
    esac
    [ $# -gt 1 ] || mistake "$1: unknown option or without its value; the command comes after --"
    case $1 in
        --name) name=$2 ;;
        --zone) zone=$2 ;;
        --project) project=$2 ;;
        --type) type=$2 ;;
        --runtime) runtime=$2 ;;
        --slices) slices=$2 ;;
        --env-file) env_file=$2 ;;
        --retries) retries=$2 ;;
        --poll) poll=$2 ;;
        --create) create_flags+=("$2") ;;
        --ssh) ssh_flags+=("$2") ;;
        *) mistake "$1: unknown option; the command comes after --" ;;
    esac
    shift 2
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    mistake "--name: lower-case letters, digits and -, a letter first; not '$name'"
[ -n "$zone" ] || mistake "--zone is missing"
[[ $slices =~ ^[1-9][0-9]*$ ]] || mistake "--slices: a whole number of at least 1, not '$slices'"
[[ $retries =~ ^[0-9]+$ ]] || mistake "--retries: a whole number, not '$retries'"
[[ $poll =~ ^[0-9.]+$ ]] || mistake "--poll: seconds, not '$poll'"
if [ "$verb" = run ]; then
    [ $# -gt 0 ] || mistake "give the command to run after --"
    [ -z "$env_file" ] || [ -r "$env_file" ] || mistake "--env-file: can't read '$env_file'"
    case $type in
        v6e-*) image=v2-alpha-tpuv6e ;;
        v5p-*) image=v2-alpha-tpuv5 ;;
        v5litepod-*) image=v2-alpha-tpuv5-lite ;;
        v[234]-*) image=tpu-ubuntu2204-base ;;
        *) mistake "--type: one such as v4-128, v5litepod-256, v5p-128, v6e-64; not '$type'" ;;
    esac
    runtime=${runtime:-$image}
elif [ $# -gt 0 ]; then
    mistake "$verb takes no command"
fi

# --- what gcloud is told

tpus=(gcloud compute tpus queued-resources)
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
worker="bash befm_jax/launch/tpu_worker.sh"

ssh_to() { # NODE WORKER COMMANDLINE
    step "${tpus[@]}" ssh "$name" "${where[@]}" "--node=$1" "--worker=$2" \
        ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$3"
}
everywhere() { ssh_to all all "$1"; }
follow() { ssh_to 0 0 "$worker follow"; }
send() {
    step "${tpus[@]}" scp "$1" "$name:$2" "${where[@]}" --node=all --worker=all \
        ${ssh_flags[@]+"${ssh_flags[@]}"}
}
state() {
    step "${tpus[@]}" list "${where[@]}" "--filter=name~/$name\$" '--format=value(state.state)'
}
remove() { step "${tpus[@]}" delete "$name" "${where[@]}" --force --quiet; }
create() {
    local nodes=("--node-id=$name")
    [ "$slices" -eq 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
    step "${tpus[@]}" create "$name" "${where[@]}" "${nodes[@]}" "--accelerator-type=$type" \
        "--runtime-version=$runtime" ${create_flags[@]+"${create_flags[@]}"}
}

# --- the run

failures=0
trouble() { # EXIT_CODE WHAT: one more failure, the last one if there were too many
    failures=$((failures + 1))
    say "$2 (failure $failures; $retries are tried again)"
    [ "$failures" -le "$retries" ] || finish "$1"
    sleep "$poll"
}
finish() { # EXIT_CODE
    if $delete; then remove; elif ! $dry_run; then
        say "$name is still there, and paid for. launch/tpu_pod.sh delete --name $name ${where[*]}"
    fi
    exit "$1"
}

make_ready() { # creates the slice or waits for it; replaces one that was taken away
    local now
    if $dry_run; then state && create && return; fi
    while true; do
        now=$(state) || now=unknown
        say "$name: ${now:-not there}"
        case $now in
            ACTIVE) return ;;
            "") create || trouble 1 "it can't be created" ;;
            SUSPENDED) remove || trouble 1 "it can't be deleted" ;;
            FAILED)
                step "${tpus[@]}" describe "$name" "${where[@]}" || true
                remove || true
                trouble 1 "the request for it failed"
                ;;
            unknown) trouble 1 "its state can't be learnt" ;;
            *) sleep "$poll" ;;
        esac
    done
}

# A command that is still running there is left alone, and its code with it.
unpack="mkdir -p befm_run && if flock -n befm_run/lock true; then rm -rf befm_jax befm_environment \
&& mkdir befm_jax && tar -xzf befm_jax.tgz -C befm_jax && $worker install; fi"

attempt() {
    send "$archive" befm_jax.tgz && everywhere "$unpack" || return
    if [ -n "$env_file" ]; then
        send "$env_file" befm_environment && everywhere "chmod 600 befm_environment" || return
    fi
    everywhere "$worker start $(quoted "$@")" || return
    follow || say "lost sight of the log; waiting for the end of the run"
}

judge() { # the worst of the exit codes: 2, stopped, an error, 75, 0
    awk '$1 == "exit" { seen[$2]; if ($2 !~ /^(0|2|75|lost|stopped)$/) error = $2 }
        END { print 2 in seen ? 2 : "stopped" in seen ? "stopped" : error ? error : \
            75 in seen || "lost" in seen ? 75 : 0 in seen ? 0 : 1 }'
}

case $verb in
    logs) follow && exit ;;
    stop) everywhere "$worker stop" && exit ;;
    status) state && exit ;;
    delete) remove && exit ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
archive=befm_jax.tgz
if ! $dry_run; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    trap 'say "the run goes on without this terminal: see logs, stop, delete"; exit 130' INT
    archive=$scratch/$archive
fi
# What git knows or would add, as it is on disk: no environments, no runs, no data.
# shellcheck disable=SC2016 # $1 and $2 are those of the inner shell
step bash -o pipefail -c 'cd "$1" && git ls-files -z --cached --others --exclude-standard |
    tar --null -T - -czf "$2"' pack "$root" "$archive"

while true; do
    make_ready
    if $dry_run; then attempt "$@" && everywhere "$worker wait" && finish 0; fi
    outcome=unreachable
    if attempt "$@" && codes=$(everywhere "$worker wait"); then
        say "ended:"$'\n'"$codes"
        outcome=$(judge <<<"$codes")
    fi
    case $outcome in
        0 | 2) finish "$outcome" ;;
        stopped) finish 75 ;;
        75) say "to be resumed" && sleep "$poll" ;;
        unreachable)
            sleep "$poll"
            [ "$(state)" != ACTIVE ] || trouble 1 "its hosts can't be reached"
            ;;
        *) trouble "$outcome" "exit code $outcome" ;;
    esac
done
