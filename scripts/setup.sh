# Sourced by demo.sh and test.sh: virtual environments with what scripts/requirements-*.txt pin, and
# speedbench. Engines that want different versions of the same packages get one each.
#
#   setup VENV LOCK...   install these lock files unless they are installed already (no network then)

setup() {
    local venv=$1 python stamp want lock
    shift
    local PATH=$PWD/$venv/bin:$PATH # what is built here finds cmake and ninja of the lock file
    python=$(command -v python3.11 || command -v python3)
    # A line per file, of what was installed last: two calls may share an environment.
    want=$(sha256sum "$@" setup.cfg)
    stamp=$venv/installed
    if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] &&
        [ "$(grep -cxFf "$stamp" <<<"$want")" = $(($# + 1)) ]; then
        return
    fi
    echo "installing into $(pwd)/$venv (about 500 MB the first time)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    touch "$stamp"
    for lock in "$@" setup.cfg; do
        sed -i "\|  $lock\$|d" "$stamp" # until it is installed again
    done
    for lock in "$@"; do
        # Everything is pinned and nothing is resolved, so no CUDA build can come along. PyTorch's
        # CPU build is not on PyPI: its own index is asked last.
        "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -r "$lock" \
            2>"$venv/pip.log" ||
            PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-} ${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" \
                "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation \
                -r "$lock" || {
            cat "$venv/pip.log" >&2
            echo "the packages of $lock could not be installed: see pip's message above" >&2
            return 2
        }
    done
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e . 2>"$venv/pip.log" || {
        cat "$venv/pip.log" >&2
        return 2
    }
    if "$venv/bin/python" -m pip list --format=freeze 2>/dev/null | grep -iE '^(nvidia-|triton=)'; then
        echo "these CUDA packages do not belong into a CPU installation: remove $venv and retry" >&2
        return 2
    fi
    echo "$want" >>"$stamp"
}
