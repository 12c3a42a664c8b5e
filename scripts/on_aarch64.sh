#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
Run this checkout on an emulated aarch64, the architecture of new Macs and of ARM servers.

    scripts/on_aarch64.sh [--cache DIR] [ARGUMENTS...]            ltx2ref ARGUMENTS; without any, ltx2ref verify
    scripts/on_aarch64.sh [--cache DIR] --python ARGUMENTS...     python ARGUMENTS

Examples:
    scripts/on_aarch64.sh
    scripts/on_aarch64.sh verify --case '2.0/*'
    scripts/on_aarch64.sh --python -c 'import platform, torch; print(platform.machine(), torch.__version__)'
    scripts/on_aarch64.sh --python my_script.py --its-option

The first run needs an x86-64 Debian and root: it installs what is missing of qemu-user-static and debootstrap, and
makes a folder with an aarch64 Python 3.11 and torch 2.9.1 (730 MB, a few minutes). Later runs find that folder and
need no root. Commands run in the current folder. Under emulation importing torch takes 15 seconds or more, and all
cases of verify eight minutes of a core; "Can't open MIDR_EL1 sysfs entry" is oneDNN's, about the emulated processor.

    --cache DIR     where that folder is, as DIR/aarch64; default $LTX2REF_CACHE, else ~/.cache/ltx2ref
                    (or $XDG_CACHE_HOME/ltx2ref)
TEXT
}

fail() {
    echo "on_aarch64.sh: $*" >&2
    exit 2
}

cache=${LTX2REF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ltx2ref}
python=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --cache) [ -n "${2:-}" ] || fail "--cache: expected a folder after it"; cache=$2; shift 2 ;;
        --cache=*) cache=${1#*=}; [ -n "$cache" ] || fail "--cache: expected a folder after it"; shift ;;
        --python)
            [ $# -gt 1 ] || fail "--python: expected a file, or -c and code, after it"
            python=yes; shift; break ;;
        --) shift; break ;;
        -*) fail "$1: no such option; --help lists them" ;;
        *) break ;;
    esac
done

if [ "$(uname -s) $(uname -m)" != "Linux x86_64" ]; then
    fail "this machine is $(uname -s) on $(uname -m), expected Linux on x86_64; on an aarch64 run ltx2ref itself"
fi
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$(realpath -m "$cache")/aarch64
root=$cache/root     # Debian's aarch64 files, where the emulator looks before it looks at this machine's
site=$cache/site     # the Python packages

# torch 2.9.1's package for aarch64 is for the CPU alone; 2.13.0's is for CUDA and would need its packages as well.
wanted="torch==2.9.1 $(grep -E '^(numpy|safetensors|einops)==' "$checkout/constraints.txt" | tr '\n' ' ')"
wanted+="filelock typing_extensions sympy networkx jinja2 fsspec mpmath markupsafe"

install_emulator() {
    local missing=()
    command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
    if [ ! -e "$root" ]; then
        command -v debootstrap >/dev/null || missing+=(debootstrap)
        [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
    fi
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "apt-get is missing: expected a Debian, or ${missing[*]} installed by hand"
    [ "$(id -u)" = 0 ] || fail "not root: expected root to install ${missing[*]}"
    echo "on_aarch64.sh: installing ${missing[*]}" >&2
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

make_root() {
    [ ! -e "$root" ] || return 0
    [ "$(id -u)" = 0 ] || fail "not root: debootstrap, which makes $root, expects root"
    echo "on_aarch64.sh: making $root" >&2
    local new=$cache/root.new package
    rm -rf "$new"
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$new" >"$cache/root.log" 2>&1 ||
        fail "debootstrap failed; its output is in $cache/root.log"
    # The second stage of debootstrap would run aarch64 programs in a chroot. Nothing here needs a configured system:
    # the files of its packages are enough.
    for package in "$new"/var/cache/apt/archives/*.deb; do
        dpkg -x "$package" "$new"
    done
    # A path that exists in the root hides this machine's: with an empty /tmp or /home in there, Python would list
    # nothing in this machine's, and /dev and /proc are wanted from this machine as well.
    find "$new" -mindepth 1 -maxdepth 1 ! -name usr ! -name 'lib*' ! -name bin -exec rm -rf {} +
    mv "$new" "$root"    # last, so that a root that exists is complete
}

install_packages() {
    [ "$(cat "$site/.packages" 2>/dev/null)" != "$wanted" ] || return 0
    python3 -m pip --version >/dev/null 2>&1 ||
        fail "python3 -m pip does not run: expected pip (Debian's python3-pip) for the aarch64 packages"
    echo "on_aarch64.sh: installing torch and what it needs into $site" >&2
    rm -rf "$site.new"
    # Without --no-deps pip would judge by this machine's architecture and fetch CUDA. A wheel names the oldest glibc
    # that it runs with, and pip takes only the platforms that it is told: the root's glibc is 2.36.
    # shellcheck disable=SC2086  # one word for each package
    PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
        python3 -m pip install -q --no-deps --no-compile --target "$site.new" --only-binary=:all: \
        --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 $wanted >&2 ||
        fail "pip could not install the aarch64 packages; what it says is above"
    rm -rf "$site"
    echo "$wanted" >"$site.new/.packages"
    mv "$site.new" "$site"
}

if [ ! -e "$root" ] || [ "$(cat "$site/.packages" 2>/dev/null)" != "$wanted" ] ||
    ! command -v qemu-aarch64-static >/dev/null; then
    mkdir -p "$cache" 2>/dev/null || fail "--cache: cannot make the folder $cache"
    exec 9>"$cache/lock"
    flock 9    # two runs do not make the folder at once
    install_emulator
    make_root
    install_packages
    exec 9>&-
fi

# This machine's settings for Python, BLAS and the loader are not the emulated machine's.
run=(env -u PYTHONHOME -u LD_PRELOAD -u LD_LIBRARY_PATH -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE
    "PYTHONPATH=$checkout:$site${PYTHONPATH:+:$PYTHONPATH}"
    qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11")
if [ -n "$python" ]; then
    exec "${run[@]}" "$@"
fi
[ $# -gt 0 ] || set -- verify
# -P: the current folder is not on the path, or another checkout in it would be run in place of this one.
exec "${run[@]}" -P -m ltx2ref "$@"
