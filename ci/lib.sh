# shellcheck shell=bash
# What the scripts in ci/ share: where the repository is, how they speak, and the build environment.
# Sourced, never run: `source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"`.
#
# Afterwards: REPO is the repository's top directory, and LIBCLANG_PATH points at a libclang that bindgen can use.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET_DIR=${CARGO_TARGET_DIR:-$REPO/target}
export REPO TARGET_DIR
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}

say() { echo "==> $*"; }
warn() { echo "warning: $*" >&2; }

# die MESSAGE [WHAT TO DO NEXT]
die() {
	echo "error: $1" >&2
	[ $# -lt 2 ] || echo "  next: $2" >&2
	exit 1
}

# The comment block at the top of a script is its --help.
usage() { sed -n '2,/^[^#]/{/^#/!d;s/^# \?//p}' "$1"; }

have() { command -v "$1" >/dev/null 2>&1; }

# as_root COMMAND...: directly, or through sudo without asking for a password in CI.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif have sudo; then
		sudo ${CI:+-n} "$@"
	else
		die "'$1' needs root, and there is no sudo here" "run this script as root"
	fi
}

# can_be_root: without asking anybody.
can_be_root() { [ "$(id -u)" = 0 ] || { have sudo && sudo -n true 2>/dev/null; }; }

# limited TIME COMMAND...: nothing in ci/ may hang for ever.
limited() {
	local limit=$1 rc=0
	shift
	timeout --foreground -k 15 "$limit" "$@" || rc=$?
	[ "$rc" != 124 ] || echo "error: timed out after $limit: $*" >&2
	return "$rc"
}

# rdma-sys generates its bindings with an old bindgen that panics on libclang 16 and later, and clang-sys takes the
# newest libclang it finds. So where there are several, we point it at 15 or 14.
find_libclang() {
	local v dir
	for v in 15 14; do
		for dir in "/usr/lib/llvm-$v/lib" "/usr/lib/llvm$v/lib" "/usr/lib64/llvm$v/lib"; do
			if compgen -G "$dir/libclang*.so*" >/dev/null; then
				echo "$dir"
				return
			fi
		done
	done
	return 1
}

if [ -z "${LIBCLANG_PATH:-}" ] && LIBCLANG_PATH=$(find_libclang); then
	export LIBCLANG_PATH
	# Its own headers, not those of a newer clang on the PATH.
	[ ! -x "${LIBCLANG_PATH%/lib}/bin/clang" ] || export CLANG_PATH=${CLANG_PATH:-${LIBCLANG_PATH%/lib}/bin/clang}
fi
[ -n "${LIBCLANG_PATH:-}" ] || unset LIBCLANG_PATH

# A rustup that was just installed is not on the PATH of the shell that called us.
if ! have cargo && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
	PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
fi
