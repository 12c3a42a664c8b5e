#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
Run this checkout with another torch, or another Python.

    scripts/on_torch.sh [--cache DIR] [--python PYTHON] VERSION [COMMAND...]     without a command, ltx2ref verify

Examples:
    scripts/on_torch.sh 2.8.0
    scripts/on_torch.sh --python 3.13 2.13.0
    scripts/on_torch.sh 2.8.0 ltx2ref verify --case '2.0/*'
    scripts/on_torch.sh 2.8.0 python -c 'import torch; print(torch.__version__)'
    scripts/on_torch.sh 2.8.0 python "$PWD/my_script.py"

The first run makes a virtual environment with that torch and the other packages of constraints.txt; later runs find it.
Each run installs the checkout, as it is, into a temporary folder and runs COMMAND in an empty one: what is imported is
what a user would get, and a path in COMMAND has to be absolute.

pip's own settings apply (PIP_INDEX_URL, PIP_FIND_LINKS, ...), and VERSION may be 2.13.0+cpu. On x86-64 the default
index has only builds with CUDA, which do not import without their CUDA packages: 5 to 7 GB an environment.

    --python PYTHON   a version, as 3.12, or an interpreter; default python3
    --cache DIR       the environment is DIR/torch-VERSION-pythonX.Y; default $LTX2REF_CACHE, else ~/.cache/ltx2ref
                      (or $XDG_CACHE_HOME/ltx2ref)
TEXT
}

fail() {
    echo "on_torch.sh: $*" >&2
    exit 2
}

cache=${LTX2REF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ltx2ref}
python=python3
version=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --cache | --python) [ -n "${2:-}" ] || fail "$1: expected a value after it"; declare "${1#--}=$2"; shift 2 ;;
        --cache=?* | --python=?*) option=${1%%=*}; declare "${option#--}=${1#*=}"; shift ;;
        -*) fail "$1: no such option, or no value; --help lists them" ;;
        *)  # an option may stand before or after the version; what follows both is the command
            [ -z "$version" ] || break
            version=$1; shift ;;
    esac
done
[ -n "$version" ] || fail "expected a version of torch, as 2.8.0; --help has examples"
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+[A-Za-z0-9.+]*$ ]] || fail "$version: expected a version of torch, as 2.8.0"

if [[ $python =~ ^3\.[0-9]+$ ]]; then
    wanted=$python
    python=python$wanted
    # pyenv's python3.12 fails where a 3.12 is installed, but not chosen.
    if ! "$python" -c '' 2>/dev/null && chosen=$(pyenv latest "$wanted" 2>/dev/null); then
        python=$(pyenv root)/versions/$chosen/bin/python
    fi
fi
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "--python: $python does not run; expected an installed Python, as 3.12, or its path"

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env=$(realpath -m "$cache")/torch-$version-python$minor

make_env() {
    [ ! -e "$env/complete" ] || return 0
    echo "on_torch.sh: making $env" >&2
    rm -rf "$env"
    "$python" -m venv "$env" || fail "$python cannot make a virtual environment (Debian has this in python3-venv)"
    grep -E '^(numpy|safetensors|einops|rich|hatchling)==' "$checkout/constraints.txt" >"$env/requirements.txt"
    "$env/bin/pip" install -q --no-compile "torch==$version" -r "$env/requirements.txt" >&2 ||
        fail "pip could not install torch $version on Python $minor; what it says is above"
    touch "$env/complete"    # last, so that an environment that has it is whole
}

if [ ! -e "$env/complete" ]; then
    mkdir -p "${env%/*}" 2>/dev/null || fail "--cache: cannot make the folder ${env%/*}"
    exec 9>"$env.lock"
    flock 9    # two runs do not make the same environment at once
    make_env
    rm -f "$env.lock"
    exec 9>&-
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/empty"
# Not into the environment: several checkouts share it, and may run at the same time.
"$env/bin/pip" install -q --no-deps --no-build-isolation --no-compile --target "$work/site" "$checkout" >&2 ||
    fail "pip could not install $checkout; what it says is above"
[ $# -gt 0 ] || set -- ltx2ref verify
cd "$work/empty"
PYTHONPATH=$work/site PATH=$work/site/bin:$env/bin:$PATH "$@"
