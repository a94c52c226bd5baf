# shellcheck shell=bash
# Sourced by the job scripts beside it: what they share.
#
#   begin FLAG...                  where the run goes, and run.py's flags; --resume where it began before
#   step SRUN_OPTION... -- WORD... one job step, in the container if there is one; waits for its end
#   finish                         exit with the step's code, or have the job start again
#
# Slurm sends USR1 to the job script (--signal=B:USR1@120) before time is up or it preempts the job.
# The script passes it on; run.py stores what it has measured and exits with 138; the job is queued
# again and goes on with --resume.

preempted=
signalled=
step_pid=
status=0

begin() {
    cd "$SPEEDBENCH" || exit 2
    flags=("$@" --save_dir "$RUN_DIR")
    # A folder tells whether something was begun in it; of a URL, that the job was started before.
    if [ -f "$RUN_DIR/manifest.json" ] || [ -f "$RUN_DIR/sweep.json" ] ||
        [[ $RUN_DIR == *://* && ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then
        flags+=(--resume)
    fi
    # shellcheck disable=SC2034 # the scripts use it
    read -r -a run <<<"$RUN"
    # Slurm's default may bind one task, and with it the engine, to a core; and a task that waits for
    # another which has failed would wait for ever.
    options=(--cpu-bind=none --kill-on-bad-exit=1)
    if [ -n "$CONTAINER" ]; then
        options+=(--container-image="$CONTAINER" --container-workdir="$SPEEDBENCH")
        if [ -n "$MOUNTS" ]; then
            options+=(--container-mounts="$MOUNTS")
        fi
    fi
    trap 'pass_on USR1; preempted=yes' USR1
    trap 'pass_on TERM' TERM
}

head_of_nodes() {
    # HOST:PORT where the nodes of one engine meet; nothing where there is one node.
    if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
        printf '%s:%s' "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" "$PORT"
    fi
}

pass_on() {
    signalled=yes
    [ -n "$step_pid" ] || return 0
    kill -"$1" "$step_pid" 2>/dev/null || true
    # An engine that is still starting does not end before it has started: do not wait for it.
    { timeout "$GRACE_S" tail --pid="$step_pid" -f /dev/null || kill -KILL "$step_pid"; } \
        >/dev/null 2>&1 &
}

step() {
    local own=()
    while [ "$1" != -- ]; do
        own+=("$1")
        shift
    done
    shift
    if [ -n "$signalled" ]; then # before there was anything to pass it on to
        status=143
        return
    fi
    srun "${options[@]}" "${own[@]}" "$@" &
    step_pid=$!
    while :; do # a signal ends `wait` though the step goes on
        signalled=
        status=0
        wait "$step_pid" || status=$?
        [ -n "$signalled" ] || break
    done
}

finish() {
    if [ "$status" = 138 ] || { [ -n "$preempted" ] && [ "$status" != 0 ]; }; then
        echo "preempted: $RUN_DIR goes on when the job starts again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
